"""Extend attention in plain torch: fresh rows against codes and 16-bit rows. The specification.

A request attends to two sources: closed pages, dequantized from their codes (sink tokens from
their 16-bit rows), and the 16-bit rows of the pages it touches in this step. A mask says which of
the two a query takes for each position; each position is taken from exactly one.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.dequantize import decode_keys, decode_values
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.kernels.extend.passes import ExtendRequest, ScratchFills
from sgl_kvq.memory_pool.storage import PagedCache


def extend_mask(request: ExtendRequest, device: torch.device) -> torch.Tensor:
    """Which keys each fresh query reads.

    Returns:
        bool [seq_len - prefix_len, closed tokens + touched tokens]; touched tokens begin at the
        page of position `prefix_len` and end at `seq_len`.
    """
    queries = torch.arange(request.prefix_len, request.seq_len, device=device)[:, None]
    closed = torch.arange(request.num_closed * PAGE_SIZE, device=device)
    touched = torch.arange(request.first_touched * PAGE_SIZE, request.seq_len, device=device)
    if request.quantized:
        own_page = queries // PAGE_SIZE * PAGE_SIZE
        return torch.cat([closed < own_page, (touched >= own_page) & (touched <= queries)], dim=1)
    return torch.cat([(closed >= 0).expand(len(queries), -1), touched <= queries], dim=1)


def extend(
    q: torch.Tensor,
    cache: PagedCache,
    layout: PageLayout,
    requests: list[ExtendRequest],
    closed: list[ScratchFills],
    touched_rows: torch.Tensor,
    sm_scale: float,
) -> torch.Tensor:
    """Causal attention of fresh tokens over their whole sequences.

    Args:
        q: [tokens, num_qo_heads, head_dim], after RoPE, requests one after the other.
        cache: The layer's storage, with this step's rows appended.
        layout: Of the pages.
        requests: The batch.
        closed: For each request the pages it reads in codes, in order of position.
        touched_rows: [touched pages, 2, PAGE_SIZE, num_kv_heads, head_dim], 16-bit K and V of every
            page this step writes to, rows of earlier steps included.
        sm_scale: Factor on the scores.

    Returns:
        Like q.
    """
    out = torch.empty_like(q)
    for request, pages in zip(requests, closed, strict=True):
        k, v = _request_kv(cache, layout, request, pages, touched_rows, q.dtype)
        mask = extend_mask(request, q.device)
        fresh = slice(request.q_start, request.q_end)
        attended = scaled_dot_product_attention(
            q[fresh].transpose(0, 1)[None], k[None], v[None], mask, scale=sm_scale, enable_gqa=True
        )
        out[fresh] = attended[0].transpose(0, 1)
    return out


def _request_kv(
    cache: PagedCache,
    layout: PageLayout,
    request: ExtendRequest,
    closed_pages: ScratchFills,
    touched_rows: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one request, closed tokens before touched ones, each [H, tokens, D] of `dtype`."""
    num_closed = len(closed_pages.pages)
    num_touched_tokens = request.seq_len - request.first_touched * PAGE_SIZE
    shape = (2, layout.num_kv_heads, num_closed * PAGE_SIZE + num_touched_tokens, layout.head_dim)
    kv = torch.empty(shape, dtype=dtype, device=cache.pages.device)
    closed, touched = kv.split([num_closed * PAGE_SIZE, num_touched_tokens], dim=2)
    if num_closed:
        rows = torch.index_select(cache.pages, 0, closed_pages.pages)
        by_page = closed.unflatten(2, (num_closed, PAGE_SIZE)).transpose(1, 2)  # [2, N, H, P, D]
        by_page[0] = decode_keys(rows, layout)
        by_page[1] = decode_values(rows, layout)
        sinks = cache.sink_rows[closed_pages.sink_pages[0]]
        closed[:, :, : sinks.shape[1]] = sinks.transpose(1, 2)
    rows = touched_rows[request.touched_start : request.touched_start + request.num_touched]
    flat = rows.permute(1, 3, 0, 2, 4).flatten(2, 3)  # [2, H, tokens, D]
    touched[:] = flat[:, :, :num_touched_tokens]
    k, v = kv
    return k, v
