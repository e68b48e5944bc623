"""Sizes of the extend operation."""

from __future__ import annotations

import torch

from sgl_kvq.formats.base import PAGE_SIZE

# Bytes of 16-bit K and V that a pass over the cached prefix may take: a share of the device's
# memory, within bounds. One buffer serves all layers.
SCRATCH_SHARE = 1 / 256
SCRATCH_BYTES = (128 << 20, 512 << 20)

# Head sizes that every prefill kernel exists for; others are padded to the next one.
PREFILL_HEAD_DIMS = (64, 128, 256)


def prefill_head_dim(head_dim: int) -> int:
    """Channels that a head takes in the scratch buffer."""
    return next(dim for dim in PREFILL_HEAD_DIMS if dim >= head_dim)


def scratch_pages(num_kv_heads: int, head_dim: int, device: torch.device | str) -> int:
    """Pages of 16-bit K and V that the scratch buffer holds."""
    smallest, largest = SCRATCH_BYTES
    total = torch.cuda.mem_get_info(device)[1] if torch.device(device).type == "cuda" else 0
    num_bytes = min(max(int(total * SCRATCH_SHARE), smallest), largest)
    return num_bytes // (4 * PAGE_SIZE * num_kv_heads * prefill_head_dim(head_dim))
