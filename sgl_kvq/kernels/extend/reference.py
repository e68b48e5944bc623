"""Extend attention in plain torch: fresh rows against codes and 16-bit rows. The specification.

A request attends to two sources: closed pages, dequantized from their codes (sink tokens from
their 16-bit rows), and the 16-bit rows of the pages it touches in this step. A mask says which of
the two a query takes for each position; each position is taken from exactly one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.dequantize import decode_keys, decode_values
from sgl_kvq.formats.page_layout import PageLayout


@dataclass(frozen=True)
class ExtendRequest:
    """One request of an extend batch, positions counted from the start of its sequence.

    Args:
        prefix_len: Tokens cached before this step.
        seq_len: Tokens after it.
        q_start: Its first row in q.
        pages: int64 [closed pages to read], in order of position.
        touched_start: Its first page in the step's touched pages; that page holds position
            `prefix_len`.
        sink_slot: Where its sink rows lie; read only when a closed page is.
    """

    prefix_len: int
    seq_len: int
    q_start: int
    pages: torch.Tensor
    touched_start: int
    sink_slot: int


def closed_pages_read(prefix_len: int, seq_len: int, quantized_prefill: bool) -> int:
    """Pages that queries of this step read in codes: those before it, or all but the last one."""
    return (seq_len - 1) // PAGE_SIZE if quantized_prefill else prefix_len // PAGE_SIZE


def extend_mask(
    request: ExtendRequest, quantized_prefill: bool, device: torch.device
) -> torch.Tensor:
    """Which keys each fresh query reads.

    Returns:
        bool [seq_len - prefix_len, closed tokens + touched tokens]; touched tokens begin at the
        page of position `prefix_len` and end at `seq_len`.
    """
    queries = torch.arange(request.prefix_len, request.seq_len, device=device)[:, None]
    num_closed = len(request.pages)
    closed = torch.arange(num_closed * PAGE_SIZE, device=device)
    first_touched = request.prefix_len // PAGE_SIZE * PAGE_SIZE
    touched = torch.arange(first_touched, request.seq_len, device=device)
    if quantized_prefill:
        own_page = queries // PAGE_SIZE * PAGE_SIZE
        return torch.cat([closed < own_page, (touched >= own_page) & (touched <= queries)], dim=1)
    return torch.cat([(closed >= 0).expand(len(queries), -1), touched <= queries], dim=1)


def extend(
    q: torch.Tensor,
    pages: torch.Tensor,
    touched_rows: torch.Tensor,
    sink_rows: torch.Tensor,
    requests: list[ExtendRequest],
    layout: PageLayout,
    sm_scale: float,
    quantized_prefill: bool,
) -> torch.Tensor:
    """Causal attention of fresh tokens over their whole sequences.

    Args:
        q: [tokens, num_qo_heads, head_dim], after RoPE, requests one after the other.
        pages: uint8 [num_pages, page_bytes], pages that closed in this step included.
        touched_rows: [touched pages, 2, PAGE_SIZE, num_kv_heads, head_dim], 16-bit K and V of every
            page this step writes to, rows of earlier steps included.
        sink_rows: [num_sink_slots, 2, sink_tokens, num_kv_heads, head_dim].
        requests: Page tables of the batch.
        layout: Of the pages.
        sm_scale: Factor on the scores.
        quantized_prefill: A query reads every closed page in codes, also one that closed in this
            step; otherwise only those closed before it.

    Returns:
        Like q.
    """
    out = torch.empty_like(q)
    for request in requests:
        k, v = _request_kv(pages, touched_rows, sink_rows, request, layout, q.dtype)
        mask = extend_mask(request, quantized_prefill, q.device)
        fresh = slice(request.q_start, request.q_start + request.seq_len - request.prefix_len)
        attended = scaled_dot_product_attention(
            q[fresh].transpose(0, 1)[None], k[None], v[None], mask, scale=sm_scale, enable_gqa=True
        )
        out[fresh] = attended[0].transpose(0, 1)
    return out


def _request_kv(
    pages: torch.Tensor,
    touched_rows: torch.Tensor,
    sink_rows: torch.Tensor,
    request: ExtendRequest,
    layout: PageLayout,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one request, closed tokens before touched ones, each [H, tokens, D] of `dtype`."""
    num_closed = len(request.pages)
    first_page = request.prefix_len // PAGE_SIZE
    num_touched_tokens = request.seq_len - first_page * PAGE_SIZE
    shape = (2, layout.num_kv_heads, num_closed * PAGE_SIZE + num_touched_tokens, layout.head_dim)
    kv = torch.empty(shape, dtype=dtype, device=pages.device)
    closed, touched = kv.split([num_closed * PAGE_SIZE, num_touched_tokens], dim=2)
    if num_closed:
        rows = torch.index_select(pages, 0, request.pages)
        by_page = closed.unflatten(2, (num_closed, PAGE_SIZE)).transpose(1, 2)  # [2, N, H, P, D]
        by_page[0] = decode_keys(rows, layout)
        by_page[1] = decode_values(rows, layout)
        sinks = sink_rows[request.sink_slot]
        closed[:, :, : sinks.shape[1]] = sinks.transpose(1, 2)
    num_touched = -(-num_touched_tokens // PAGE_SIZE)
    rows = touched_rows[request.touched_start : request.touched_start + num_touched]
    flat = rows.permute(1, 3, 0, 2, 4).flatten(2, 3)  # [2, H, tokens, D]
    touched[:] = flat[:, :, :num_touched_tokens]
    k, v = kv
    return k, v
