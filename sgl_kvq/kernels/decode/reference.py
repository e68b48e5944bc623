"""Decode attention over code pages in plain torch. This file is the specification.

All products run on codes in float32 (float64 for a float64 q), which holds them exactly; nothing is
dequantized to memory. For a query q and a page with per-channel (s, m):
q . k_t = sum_c (q_c s_c) code_tc + sum_c q_c m_c; per-token groups move s and m outside the sum.
"integer" arithmetic first quantizes the left factor to 8 bits, u ~ alpha a + mu, and takes mu times
the cached code sums, as HACK does.

Source: HACK (arXiv 2502.03589) equation 4 and its ATC '26 form for per-channel K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from sgl_kvq.config import PAGE_SIZE
from sgl_kvq.formats.base import Arithmetic, Coding
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.kernels.hadamard import rotate
from sgl_kvq.kernels.paged_cache import PagedCache, PageTable
from sgl_kvq.kernels.pages import unpack_planes

LOG2_E = math.log2(math.e)
_LEFT_MAX_CODE = 255  # 8-bit queries and probabilities


@dataclass(frozen=True)
class DecodePlan:
    """Index tensors of a batch, the same for every layer.

    Args:
        pages: int64 [N], closed pages of all requests.
        requests: int64 [N], whose they are.
        page_bias: float32 [N, 1, 1, PAGE_SIZE], 0 for tokens read from codes, -inf for sinks.
        tail_mask: bool [batch, 1, 1, sink_tokens + PAGE_SIZE], valid 16-bit rows.
        open_slots: int64 [batch].
        sink_slots: int64 [batch].
    """

    pages: torch.Tensor
    requests: torch.Tensor
    page_bias: torch.Tensor
    tail_mask: torch.Tensor
    open_slots: torch.Tensor
    sink_slots: torch.Tensor


def plan_decode(table: PageTable, sink_tokens: int) -> DecodePlan:
    """Prepare what all layers share.

    Args:
        table: The batch.
        sink_tokens: Leading tokens kept in 16 bits.
    """
    device = table.kv_indices.device
    num_closed = table.kv_indptr.diff().long() - 1
    batch = torch.arange(len(num_closed), device=device)
    requests = torch.repeat_interleave(batch, num_closed)
    first = torch.cumsum(num_closed, 0) - num_closed
    position = torch.arange(len(requests), device=device) - first[requests]
    pages = table.kv_indices[table.kv_indptr[:-1].long()[requests] + position].long()
    token = torch.arange(PAGE_SIZE, device=device)
    is_sink = (position[:, None] == 0) & (token < sink_tokens)
    page_bias = torch.zeros(is_sink.shape, device=device).masked_fill_(is_sink, -torch.inf)
    has_sinks = (num_closed > 0)[:, None].expand(-1, sink_tokens)
    tail_mask = torch.cat([has_sinks, token < table.kv_last_page_len[:, None]], dim=1)
    return DecodePlan(
        pages=pages,
        requests=requests,
        page_bias=page_bias[:, None, None, :],
        tail_mask=tail_mask[:, None, None, :],
        open_slots=table.open_slots.long(),
        sink_slots=table.sink_slots.long(),
    )


def decode(
    q: torch.Tensor,
    cache: PagedCache,
    plan: DecodePlan,
    layout: PageLayout,
    sm_scale: float,
    arithmetic: Arithmetic = "dequantize",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query a request over its whole cached sequence.

    Args:
        q: [batch, num_qo_heads, head_dim], after RoPE.
        cache: The layer's storage; the request's newest row is already in its open slot.
        plan: From `plan_decode`.
        layout: Of the pages.
        sm_scale: Factor on the scores.
        arithmetic: How products with codes are computed; "integer" needs a format with code sums.

    Returns:
        out like q; lse float32 [batch, num_qo_heads], log base 2 as FlashInfer's.
    """
    batch, num_qo_heads, head_dim = q.shape
    compute_dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = (
        q.to(compute_dtype).view(batch, layout.num_kv_heads, -1, head_dim) * sm_scale
    )  # [B, H, G, D]
    tail_k, tail_v = _tail_rows(cache, plan, compute_dtype)  # [B, H, S + P, D]
    tail_scores = grouped @ tail_k.transpose(-1, -2)
    tail_scores = tail_scores.masked_fill(~plan.tail_mask, -torch.inf)
    top = tail_scores.amax(-1)  # [B, H, G]

    rows = torch.index_select(cache.pages, 0, plan.pages)
    integer = arithmetic == "integer"
    scores = page_scores(grouped[plan.requests], rows, layout, integer)  # [N, H, G, P]
    scores = scores + plan.page_bias
    owners = plan.requests[:, None, None].expand(scores.shape[:3])
    top = top.scatter_reduce(0, owners, scores.amax(-1), "amax")

    tail_weights = torch.exp(tail_scores - top[..., None])
    weights = torch.exp(scores - top[plan.requests][..., None])
    total = tail_weights.sum(-1).index_add(0, plan.requests, weights.sum(-1))
    out = torch.zeros_like(grouped)
    out.index_add_(0, plan.requests, page_values(weights, rows, layout, integer))
    if layout.format.v.rotated:
        out = rotate(out, layout.rotation_order)
    out = (out + tail_weights @ tail_v) / total[..., None]
    lse = (top + total.log()) * LOG2_E
    lse = lse.float().view(batch, num_qo_heads)
    return out.view(batch, num_qo_heads, head_dim).to(q.dtype), lse


def _tail_rows(
    cache: PagedCache, plan: DecodePlan, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather sink and open rows as K and V of `dtype`, each [batch, H, sink_tokens + P, D]."""
    rows = torch.cat([cache.sink_rows[plan.sink_slots], cache.open_rows[plan.open_slots]], dim=2)
    # A slot's unwritten rows may hold anything, and 0 * NaN is NaN.
    valid = plan.tail_mask.view(len(rows), 1, -1, 1, 1)
    k, v = rows.masked_fill(~valid, 0).to(dtype).permute(1, 0, 3, 2, 4)
    return k, v


def quantize_left(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the left factor of a product to 8 bits along its last dimension.

    x ~ alpha * a + mu with a in 0..255, mu = min x, alpha = (max x - min x) / 255.

    Args:
        x: float32 [..., n].

    Returns:
        (alpha * a) like x, mu [..., 1].
    """
    mu = x.amin(-1, keepdim=True)
    alpha = (x.amax(-1, keepdim=True) - mu) / _LEFT_MAX_CODE
    alpha = torch.where(alpha > 0, alpha, torch.ones_like(alpha))
    return ((x - mu) / alpha).round() * alpha, mu


def page_scores(
    q: torch.Tensor, rows: torch.Tensor, layout: PageLayout, integer: bool
) -> torch.Tensor:
    """Scores of a page's own query group against its 64 keys.

    Args:
        q: float32 or float64 [N, H, G, D], scaled; unrotated.
        rows: uint8 [N, page_bytes].
        layout: Of the rows.
        integer: Quantize the left factor and use the cached sums.

    Returns:
        Like q, [N, H, G, PAGE_SIZE].
    """
    coding = layout.format.k
    codes = layout.view(rows, "k_codes")
    if coding.is_raw:
        return q @ codes.to(q.dtype).transpose(-1, -2)
    if coding.rotated:
        q = rotate(q, layout.rotation_order)
    scales = layout.view(rows, "k_scales").to(q.dtype)
    mins = layout.view(rows, "k_mins").to(q.dtype)
    if coding.axis == "channel":
        left = q * scales.unsqueeze(2)
        offset = (q * mins.unsqueeze(2)).sum(-1, keepdim=True)
        if not integer:
            return _k_products(left, codes, coding, 1).squeeze(2) + offset
        left, mu = quantize_left(left.unflatten(-1, (-1, layout.partition)))
        sums = layout.view(rows, "k_sums").to(q.dtype)  # [N, H, partitions, P]
        products = _k_products(left.flatten(-2), codes, coding, 1).squeeze(2)
        return products + mu.squeeze(-1) @ sums + offset
    groups = scales.shape[2]
    left = q.unflatten(-1, (groups, -1)).transpose(2, 3)  # [N, H, groups, G, D/groups]
    group_mu: torch.Tensor | None = None
    if integer:
        left, group_mu = quantize_left(left)
    products = _k_products(left.transpose(2, 3).flatten(-2), codes, coding, groups)
    left_sums = left.sum(-1, keepdim=True)  # [N, H, groups, G, 1]
    if group_mu is not None:
        products = products + group_mu * layout.view(rows, "k_sums").to(q.dtype).unsqueeze(3)
        left_sums = left_sums + group_mu * left.shape[-1]
    return (products * scales.unsqueeze(3) + left_sums * mins.unsqueeze(3)).sum(2)


def _k_products(
    left: torch.Tensor, codes: torch.Tensor, coding: Coding, groups: int
) -> torch.Tensor:
    """Multiply left [N, H, G, D] with key codes [N, H, P, D*b/8], apart for each channel group.

    Returns:
        Like left, [N, H, groups, G, P].
    """
    planes = coding.num_planes
    if groups > 1:
        natural = unpack_planes(codes, planes, -1).to(left.dtype).unflatten(-1, (groups, -1))
        return left.unflatten(-1, (groups, -1)).transpose(2, 3) @ natural.permute(0, 1, 3, 4, 2)
    # Codes stay at their bit position, 4^i (or 16^i) times too large; the left factor undoes it.
    masked = _mask_planes(codes, coding, left.dtype)  # [N, H, planes, P, D/planes]
    left = left.unflatten(-1, (planes, -1)).permute(0, 1, 3, 4, 2)  # [N, H, planes, D/planes, G]
    left = left * _undo_shift(coding, left.dtype, left.device).view(-1, 1, 1)
    return (masked @ left).sum(2).transpose(-1, -2).unsqueeze(2)


@lru_cache(maxsize=64)
def _undo_shift(coding: Coding, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[planes], what brings a masked field back to the size of its code."""
    shifts = [-coding.num_bits * plane for plane in range(coding.num_planes)]
    return torch.tensor([2.0**shift for shift in shifts], dtype=dtype, device=device)


def _mask_planes(codes: torch.Tensor, coding: Coding, dtype: torch.dtype) -> torch.Tensor:
    """Split bytes into their fields without shifting: uint8 [N, H, a, b] to [N, H, n, a, b].

    One operator a field: a broadcast over fields leaves PyTorch's vectorized path on the CPU.
    """
    num, heads, a, b = codes.shape
    fields = codes.new_empty((num, heads, coding.num_planes, a, b))
    for plane in range(coding.num_planes):
        mask = coding.max_code << (coding.num_bits * plane)
        torch.bitwise_and(codes, mask, out=fields[:, :, plane])
    return fields.to(dtype)


def page_values(
    weights: torch.Tensor, rows: torch.Tensor, layout: PageLayout, integer: bool
) -> torch.Tensor:
    """Weighted sum of a page's 64 values, in the rotated basis if V is rotated.

    Args:
        weights: float32 or float64 [N, H, G, PAGE_SIZE], 0 for tokens that are not read.
        rows: uint8 [N, page_bytes].
        layout: Of the rows.
        integer: Quantize the left factor and use the cached sums.

    Returns:
        Like weights, [N, H, G, D].
    """
    coding = layout.format.v
    codes = layout.view(rows, "v_codes")
    if coding.is_raw:
        return weights @ codes.to(weights.dtype)
    scales = layout.view(rows, "v_scales").to(weights.dtype)
    mins = layout.view(rows, "v_mins").to(weights.dtype)
    sums = layout.view(rows, "v_sums").to(weights.dtype) if integer else None  # [N, H, D]
    if coding.axis == "token":
        left = weights.unsqueeze(2) * scales.unsqueeze(3)  # [N, H, groups, G, P]
        products = _v_products(left, codes, coding, sums)
        offset = weights @ mins.transpose(-1, -2)  # [N, H, G, groups]
        return (products + offset.transpose(-1, -2).unsqueeze(-1)).transpose(2, 3).flatten(-2)
    products = _v_products(weights.unsqueeze(2), codes, coding, sums).squeeze(2)
    total = weights.sum(-1, keepdim=True)
    return products * scales.unsqueeze(2) + total * mins.unsqueeze(2)


def _v_products(
    left: torch.Tensor, codes: torch.Tensor, coding: Coding, sums: torch.Tensor | None
) -> torch.Tensor:
    """Multiply left [N, H, groups, G, P] with value codes [N, H, D*b/8, P].

    Args:
        left: Weights of each channel group.
        codes: Packed along the channels.
        coding: Of the values.
        sums: Code sums [N, H, D]: quantize the left factor and use them; None: do not.

    Returns:
        Like left, [N, H, groups, G, D / groups].
    """
    groups = left.shape[2]
    mu: torch.Tensor | None = None
    if sums is not None:
        left, mu = quantize_left(left)
    masked = _mask_planes(codes, coding, left.dtype)  # [N, H, planes, D/planes, P]
    undo = (
        _undo_shift(coding, left.dtype, left.device)
        .repeat_interleave(codes.shape[2])
        .view(groups, 1, -1)
    )
    by_group = masked.flatten(2, 3).unflatten(2, (groups, -1))  # [N, H, groups, D/groups, P]
    # Channels on the rows: 1.7 times faster on a CPU than the query group on them.
    products = (by_group @ left.transpose(-1, -2)).transpose(-1, -2) * undo
    if sums is not None and mu is not None:
        products = products + mu * sums.unflatten(-1, (groups, 1, -1))
    return products
