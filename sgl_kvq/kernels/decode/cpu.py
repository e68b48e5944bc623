"""Decode attention over quantized pages on a CPU: the plan of a batch, and softmax over its parts.

Exponentials are base 2: scores carry a factor log2(e). `cpu_pages.py` has the products with codes,
`reference.py` is the specification.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import embedding_bag

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.kernels.decode.cpu_pages import page_scores, page_values
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

    # As words: copying few elements stays on one CPU thread, see `cpu_pages._mask_planes`.
    rows = cache.pages.view(torch.int64).index_select(0, plan.pages).view(torch.uint8)
    page_q = grouped.index_select(0, plan.requests)
    scores = page_scores(page_q, rows, layout)  # [N, H, G, P]
    scores += plan.page_bias
    owners = plan.requests[:, None, None].expand(scores.shape[:3])
    top = top.scatter_reduce(0, owners, scores.amax(-1), "amax")

    tail_weights = torch.exp2(tail_scores - top[..., None])
    weights = torch.exp2(scores - top.index_select(0, plan.requests)[..., None])
    total = tail_weights.sum(-1).index_add_(0, plan.requests, weights.sum(-1))
    out = _sum_by_request(page_values(weights, rows, layout), plan)  # [B, H, G, D]
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
