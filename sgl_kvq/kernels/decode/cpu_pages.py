"""Products of queries and probabilities with the codes of pages, on a CPU.

They run on codes in float32, which holds them exactly; no page is dequantized to memory. For a
query q and a page with one (scale s, minimum m) a channel,
q . k_t = sum_c (q_c s_c) code_tc + sum_c q_c m_c; with one a token and group, s and m move outside
the sum.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from sgl_kvq.formats.base import EXTRA_BITS, PAGE_SIZE, Coding
from sgl_kvq.formats.dequantize import unpack_planes
from sgl_kvq.formats.hadamard import rotate
from sgl_kvq.formats.page_layout import PageLayout


def page_scores(q: torch.Tensor, rows: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Scores of each page's queries against its 64 keys.

    Args:
        q: float32 or float64 [N, H, G, D], scaled; unrotated.
        rows: uint8 [N, page_bytes].
        layout: Layout of the rows.

    Returns:
        Like q, [N, H, G, PAGE_SIZE].
    """
    coding = layout.format.k
    codes = layout.view(rows, "k_codes")
    if coding.is_raw:
        return q @ codes.to(q.dtype).transpose(-1, -2)
    if coding.rotated:
        q = rotate(q, layout.rotation_order)
    scales, mins = _scales_and_mins(rows, "k", layout, q.dtype)
    if coding.axis == "channel":
        left = q * scales.unsqueeze(2)
        offset = (q * mins.unsqueeze(2)).sum(-1, keepdim=True)
        products = _k_products(left, codes, coding, 1).squeeze(2)
        if outliers := coding.num_outliers(layout.head_dim):
            extra = left[..., :outliers] * 0.5**EXTRA_BITS
            extra_codes = layout.view(rows, "k_extra")
            products += _k_products(extra, extra_codes, Coding(EXTRA_BITS), 1).squeeze(2)
        return products + offset
    groups = scales.shape[2]
    products = _k_products(q, codes, coding, groups)
    sums = q.unflatten(-1, (groups, -1)).sum(-1).transpose(2, 3)  # [N, H, groups, G]
    return (products * scales.unsqueeze(3) + sums.unsqueeze(-1) * mins.unsqueeze(3)).sum(2)


def _scales_and_mins(
    rows: torch.Tensor, name: str, layout: PageLayout, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read both in one conversion, each [N, H, *shape]: minima lie right behind the scales."""
    field = layout.fields[f"{name}_scales"]
    heads = rows.view(len(rows), layout.num_kv_heads, layout.head_bytes)
    both = heads.narrow(2, field.offset_bytes, 2 * field.size_bytes).view(field.dtype).to(dtype)
    scales, mins = both.view(*both.shape[:2], 2, *field.shape).unbind(2)
    return scales, mins


def _k_products(
    left: torch.Tensor, codes: torch.Tensor, coding: Coding, groups: int
) -> torch.Tensor:
    """Multiply left [N, H, G, D] with key codes [N, H, P, D*b/8], each channel group by itself.

    Returns:
        Like left, [N, H, groups, G, P].
    """
    planes = coding.num_planes
    if groups > 1:
        natural = unpack_planes(codes, planes, -1).to(left.dtype).unflatten(-1, (groups, -1))
        return left.unflatten(-1, (groups, -1)).transpose(2, 3) @ natural.permute(0, 1, 3, 4, 2)
    # Codes stay at their bit position, 2^bits times too large from one plane to the next.
    masked = _mask_planes(codes, coding, left.dtype)  # [N, H, planes, P, D/planes]
    num, heads, gqa_group, _ = left.shape
    by_plane = left.unflatten(-1, (planes, masked.shape[-1]))
    left = by_plane.transpose(2, 3).flatten(0, 2)  # [N * H * planes, G, D/planes]
    scores = torch.bmm(left, masked.flatten(0, 2).transpose(1, 2))
    plane_scores = scores.view(num, heads, planes, gqa_group, PAGE_SIZE).unbind(2)
    products = plane_scores[-1]
    for product in plane_scores[-2::-1]:
        products = torch.add(product, products, alpha=0.5**coding.num_bits)
    return products.unsqueeze(2)


def _mask_planes(codes: torch.Tensor, coding: Coding, dtype: torch.dtype) -> torch.Tensor:
    """Split bytes into their fields without shifting: uint8 [N, H, a, b] to [N, H, n, a, b].

    Eight bytes at a time: an operator on as few elements as that stays on one CPU thread, and
    waking a second one takes longer than the work.
    """
    num, heads, a, b = codes.shape
    words = codes.view(num, heads, 1, a * b).view(torch.int64)
    fields = (words & _plane_masks(coding, codes.device)).view(torch.uint8)
    return fields.to(dtype).view(num, heads, coding.num_planes, a, b)


@lru_cache(maxsize=64)
def _plane_masks(coding: Coding, device: torch.device) -> torch.Tensor:
    """int64 [planes, 1], the bits of one field in each of eight bytes."""
    masks = [coding.max_code << (coding.num_bits * plane) for plane in range(coding.num_planes)]
    words = [int.from_bytes(bytes([mask] * 8), "little", signed=True) for mask in masks]
    return torch.tensor(words, device=device)[:, None]


@lru_cache(maxsize=64)
def _undo_shift(
    coding: Coding, head_dim: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """[head_dim], factors that turn the masked field of a channel into its code."""
    shifts = [-coding.num_bits * plane for plane in range(coding.num_planes)]
    undo = torch.tensor([2.0**shift for shift in shifts], dtype=dtype, device=device)
    return undo.repeat_interleave(head_dim // coding.num_planes)


def page_values(weights: torch.Tensor, rows: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Weighted sums of each page's 64 values.

    Args:
        weights: float32 or float64 [N, H, G, PAGE_SIZE], 0 for tokens that are not read.
        rows: uint8 [N, page_bytes].
        layout: Layout of the rows.

    Returns:
        Like weights, [N, H, G, D].
    """
    coding = layout.format.v
    codes = layout.view(rows, "v_codes")
    if coding.is_raw:
        return weights @ codes.to(weights.dtype)
    scales, mins = _scales_and_mins(rows, "v", layout, weights.dtype)
    if coding.axis == "token":
        left = weights.unsqueeze(2) * scales.unsqueeze(3)  # [N, H, groups, G, P]
        products = _v_products(left, codes, coding)
        offset = weights @ mins.transpose(-1, -2)  # [N, H, G, groups]
        return (products.transpose(2, 3) + offset.unsqueeze(-1)).flatten(-2)
    products = _v_products(weights.unsqueeze(2), codes, coding).squeeze(2)
    total = weights.sum(-1, keepdim=True)
    return products * scales.unsqueeze(2) + total * mins.unsqueeze(2)


def _v_products(left: torch.Tensor, codes: torch.Tensor, coding: Coding) -> torch.Tensor:
    """Multiply left [N, H, groups, G, P] with value codes [N, H, D*b/8, P].

    Returns:
        Like left, [N, H, groups, G, D / groups].
    """
    masked = _mask_planes(codes, coding, left.dtype)  # [N, H, planes, D/planes, P]
    num, heads, groups, gqa_group, _ = left.shape
    head_dim = coding.num_planes * codes.shape[2]
    size = head_dim // groups
    by_group = masked.view(num * heads * groups, size, PAGE_SIZE)
    products = torch.bmm(left.flatten(0, 2), by_group.transpose(1, 2))
    products = products.view(num, heads, groups, gqa_group, size)
    return products * _undo_shift(coding, head_dim, left.dtype, left.device).view(groups, 1, -1)
