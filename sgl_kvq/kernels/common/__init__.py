"""What several GPU kernels share: page specifications, register layouts, tile helpers."""
