"""Decode attention over quantized pages on a CPU, computed from the codes.

Products run on codes in float32, which holds them exactly; no page is dequantized to memory. For a
query q and a page with one (scale s, minimum m) a channel,
q . k_t = sum_c (q_c s_c) code_tc + sum_c q_c m_c; with one a token and group, s and m move outside
the sum. Exponentials are base 2: scores carry a factor log2(e). `reference.py` is the
specification.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.functional import embedding_bag

from sgl_kvq.formats.base import EXTRA_BITS, PAGE_SIZE, Coding
from sgl_kvq.formats.dequantize import unpack_planes
from sgl_kvq.formats.hadamard import rotate
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.memory_pool.storage import PagedCache, PageTable

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class DecodePlan:
    """Index tensors of a batch, the same for every layer.

    Args:
        pages: int64 [N], closed pages of all requests.
        requests: int64 [N], the request that each page belongs to.
        page_bias: float32 [N, 1, 1, PAGE_SIZE], 0 for tokens read from codes, -inf for sink tokens.
        page_order: int64 [N], 0 to N - 1.
        first_page: int64 [batch], where a request's pages begin among the N.
        tail_bias: float32 [batch, 1, 1, sink_tokens + PAGE_SIZE], 0 for 16-bit rows that are read,
            -inf for others.
        open_rows: int64 [PAGE_SIZE * 2 * batch], rows of `open_rows` of the cache, counted over
            slots: by token, then K before V, then request. The first row stands in for those not
            written yet.
        sink_pages: int64 [batch], page row with the sink rows of each request.
        no_sinks: bool [sink_tokens * 2 * batch, 1, 1], rows of requests without sinks.
    """

    pages: torch.Tensor
    requests: torch.Tensor
    page_bias: torch.Tensor
    page_order: torch.Tensor
    first_page: torch.Tensor
    tail_bias: torch.Tensor
    open_rows: torch.Tensor
    sink_pages: torch.Tensor
    no_sinks: torch.Tensor


def plan_decode(table: PageTable, sink_tokens: int) -> DecodePlan:
    """Build the index tensors of a batch.

    Args:
        table: The batch.
        sink_tokens: Leading tokens kept in 16 bits.
    """
    device = table.kv_indices.device
    num_closed = table.kv_indptr.diff().long() - 1
    batch = torch.arange(len(num_closed), device=device)
    requests = torch.repeat_interleave(batch, num_closed)
    first = torch.cumsum(num_closed, 0) - num_closed
    page_order = torch.arange(len(requests), device=device)
    position = page_order - first[requests]
    pages = table.kv_indices[table.kv_indptr[:-1].long()[requests] + position].long()
    token = torch.arange(PAGE_SIZE, device=device)
    is_sink = (position[:, None] == 0) & (token < sink_tokens)
    no_sinks = (num_closed == 0)[:, None]
    is_open = token < table.kv_last_page_len[:, None]
    unread = torch.cat([no_sinks.expand(-1, sink_tokens), ~is_open], dim=1)
    return DecodePlan(
        pages=pages,
        requests=requests,
        page_bias=_bias(is_sink)[:, None, None, :],
        page_order=page_order,
        first_page=first,
        tail_bias=_bias(unread)[:, None, None, :],
        open_rows=_row_indices(table.open_slots, token * is_open, PAGE_SIZE),
        sink_pages=table.sink_pages.long(),
        no_sinks=no_sinks.T.expand(2 * sink_tokens, -1).reshape(-1, 1, 1),
    )


def _bias(unread: torch.Tensor) -> torch.Tensor:
    """float32 like `unread`: -inf where True, 0 elsewhere."""
    return torch.zeros(unread.shape, device=unread.device).masked_fill_(unread, -torch.inf)


def _row_indices(slots: torch.Tensor, offsets: torch.Tensor, slot_rows: int) -> torch.Tensor:
    """Index the rows of [slots, 2, slot_rows] as if flat.

    Args:
        slots: int32 [batch].
        offsets: int64 [batch, n] or [n], rows inside a slot.
        slot_rows: Rows of K, and of V, in a slot.

    Returns:
        int64 [n * 2 * batch]: by offset, then K before V, then slot.
    """
    k_or_v = torch.arange(2, device=slots.device)[:, None]
    begin = (slots.long() * 2 + k_or_v) * slot_rows  # [2, batch]
    return (begin + offsets.expand(len(slots), -1).T.unsqueeze(1)).flatten()


def decode(
    q: torch.Tensor,
    cache: PagedCache,
    plan: DecodePlan,
    layout: PageLayout,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query a request over its whole cached sequence.

    Args:
        q: [batch, num_qo_heads, head_dim], after RoPE.
        cache: The layer's storage; each request's newest row is already in its open slot.
        plan: The index tensors of this batch.
        layout: Layout of the pages.
        sm_scale: Factor on the scores.

    Returns:
        out like q; lse float32 [batch, num_qo_heads], log base 2 as FlashInfer's.
    """
    batch, num_qo_heads, head_dim = q.shape
    compute_dtype = torch.promote_types(q.dtype, torch.float32)
    heads = (batch, layout.num_kv_heads)
    grouped = q.to(compute_dtype).mul(sm_scale * LOG2_E).view(*heads, -1, head_dim)  # [B, H, G, D]
    tail_k, tail_v = _tail_rows(cache, plan, compute_dtype)  # [B * H, S + P, D]
    tail_scores = torch.bmm(grouped.flatten(0, 1), tail_k.transpose(1, 2)).unflatten(0, heads)
    tail_scores += plan.tail_bias
    top = tail_scores.amax(-1)  # [B, H, G]

    # As words: copying few elements stays on one CPU thread, see `_mask_planes`.
    rows = cache.pages.view(torch.int64).index_select(0, plan.pages).view(torch.uint8)
    page_q = grouped.index_select(0, plan.requests)
    scores = _page_scores(page_q, rows, layout)  # [N, H, G, P]
    scores += plan.page_bias
    owners = plan.requests[:, None, None].expand(scores.shape[:3])
    top = top.scatter_reduce(0, owners, scores.amax(-1), "amax")

    tail_weights = torch.exp2(tail_scores - top[..., None])
    weights = torch.exp2(scores - top.index_select(0, plan.requests)[..., None])
    total = tail_weights.sum(-1).index_add_(0, plan.requests, weights.sum(-1))
    out = _sum_by_request(_page_values(weights, rows, layout), plan)  # [B, H, G, D]
    out = torch.baddbmm(out.flatten(0, 1), tail_weights.flatten(0, 1), tail_v)
    out = out.view(batch, num_qo_heads, head_dim) / total.view(batch, num_qo_heads, 1)
    lse = (top + total.log2()).float().view(batch, num_qo_heads)
    return out.to(q.dtype), lse


def _tail_rows(
    cache: PagedCache, plan: DecodePlan, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather sink and open rows as K and V of `dtype`, each [batch * H, sink_tokens + P, D].

    A slot's unwritten rows may hold anything, and 0 * NaN is NaN, so none of them is gathered.
    """
    by_request = cache.sink_rows[plan.sink_pages]  # [batch, 2, S, H, D]
    sinks = by_request.permute(2, 1, 0, 3, 4).flatten(0, 2)
    opened = cache.open_rows.flatten(0, 2).index_select(0, plan.open_rows)
    rows = torch.cat([sinks.masked_fill_(plan.no_sinks, 0), opened])  # [(S + P) * 2 * batch, H, D]
    by_head = rows.view(plan.tail_bias.shape[-1], 2, -1, *rows.shape[1:]).permute(1, 2, 3, 0, 4)
    k, v = by_head.to(dtype, memory_format=torch.contiguous_format).flatten(1, 2)
    return k, v


def _sum_by_request(values: torch.Tensor, plan: DecodePlan) -> torch.Tensor:
    """Add up the pages of each request: [N, H, G, D] to [batch, H, G, D].

    `embedding_bag` adds rows in order; `index_add` sorts first (106 against 6 us, 16 pages, Xeon).
    """
    summed = embedding_bag(plan.page_order, values.flatten(1), plan.first_page, mode="sum")
    return summed.view(-1, *values.shape[1:])


def _page_scores(q: torch.Tensor, rows: torch.Tensor, layout: PageLayout) -> torch.Tensor:
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


def _page_values(weights: torch.Tensor, rows: torch.Tensor, layout: PageLayout) -> torch.Tensor:
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
