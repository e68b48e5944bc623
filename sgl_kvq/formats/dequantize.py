"""Read the fields of page rows in plain torch."""

from __future__ import annotations

import torch

from sgl_kvq.formats.base import EXTRA_BITS, Coding, KOrV
from sgl_kvq.formats.hadamard import rotate
from sgl_kvq.formats.page_layout import PageLayout


def unpack_planes(packed: torch.Tensor, num_planes: int, dim: int) -> torch.Tensor:
    """Inverse of `pack_planes`: bytes to codes.

    Args:
        packed: uint8 [..., width, ...].
        num_planes: Codes per byte.
        dim: The packed dimension, negative.

    Returns:
        uint8, size `width * num_planes` along dim.
    """
    bits = 8 // num_planes
    planes = [(packed >> (plane * bits)) & ((1 << bits) - 1) for plane in range(num_planes)]
    return torch.cat(planes, dim)


def _affine(
    codes: torch.Tensor, rows: torch.Tensor, name: KOrV, coding: Coding, layout: PageLayout
) -> torch.Tensor:
    """Codes [N, H, P, D] to values: code * scale + min."""
    scales = layout.view(rows, f"{name}_scales").float()
    mins = layout.view(rows, f"{name}_mins").float()
    if coding.axis == "channel":
        return torch.addcmul(mins.unsqueeze(2), codes, scales.unsqueeze(2))
    grouped = codes.unflatten(-1, (scales.shape[2], -1))  # [N, H, P, G, D/G]
    scales, mins = (meta.transpose(2, 3).unsqueeze(-1) for meta in (scales, mins))
    return torch.addcmul(mins, grouped, scales).flatten(-2)


def decode_keys(rows: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Dequantize the keys of page rows, back in the unrotated basis.

    Args:
        rows: uint8 [N, page_bytes], contiguous.
        layout: Their layout.

    Returns:
        float32 [N, num_kv_heads, PAGE_SIZE, head_dim]. Sink tokens come back as the minimum.
    """
    return layout.format.dequantize(rows, layout, "k")


def decode_values(rows: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Dequantize the values of page rows; see `decode_keys`."""
    return layout.format.dequantize(rows, layout, "v")


def dequantize_pages(pages: torch.Tensor, layout: PageLayout, tensor: KOrV) -> torch.Tensor:
    """Dequantize K or V of pages of scalar formats; see `QuantFormat.dequantize`."""
    coding = getattr(layout.format, tensor)
    codes = layout.view(pages, f"{tensor}_codes")
    if coding.is_raw:
        return codes.float()
    if tensor == "k":
        steps = unpack_planes(codes, coding.num_planes, -1).float()
    else:  # token-contiguous
        steps = unpack_planes(codes, coding.num_planes, -2).transpose(2, 3).float()
    if outliers := coding.num_outliers(layout.head_dim):
        extra = unpack_planes(layout.view(pages, f"{tensor}_extra"), 8 // EXTRA_BITS, -1)
        steps[..., :outliers] += extra * 0.5**EXTRA_BITS
    values = _affine(steps, pages, tensor, coding, layout)
    return rotate(values, layout.rotation_order) if coding.rotated else values
