"""Index tensors of a batch, made once a forward and used by every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.kernels.append.cpu import ClosingPages, DecodeAppend, ExtendAppend
from sgl_kvq.kernels.decode.cpu import DecodePlan, plan_decode
from sgl_kvq.kernels.extend.reference import ExtendRequest, closed_pages_read
from sgl_kvq.memory_pool.storage import PageTable, num_pages_of
from sgl_kvq.memory_pool.store import PagedStore


@dataclass(frozen=True)
class DecodeMetadata:
    """What a decode step needs besides q, k and v."""

    append: DecodeAppend
    plan: DecodePlan


@dataclass(frozen=True)
class ExtendMetadata:
    """What an extend step needs besides q, k and v."""

    append: ExtendAppend
    requests: list[ExtendRequest]


def _page_of(req_to_token: torch.Tensor, row: int, num_pages: int) -> torch.Tensor:
    """int64 [num_pages], pages of one request in order of position."""
    return req_to_token[row, : num_pages * PAGE_SIZE : PAGE_SIZE].long() // PAGE_SIZE


def decode_metadata(
    forward_batch: Any, req_to_token: torch.Tensor, pool: PagedStore
) -> DecodeMetadata:
    """Prepare a decode step.

    Args:
        forward_batch: SGLang's `ForwardBatch`; its newest tokens are counted in `seq_lens`.
        req_to_token: int32 [requests, context], slots by position.
        pool: Who owns which slot.
    """
    seq_lens = forward_batch.seq_lens.long()
    num_pages = num_pages_of(forward_batch.seq_lens_cpu.long())
    device = seq_lens.device
    indptr = torch.zeros(len(num_pages) + 1, dtype=torch.int32)
    indptr[1:] = torch.cumsum(num_pages, 0)
    batch = torch.repeat_interleave(torch.arange(len(num_pages)), num_pages)
    position = torch.arange(len(batch)) - indptr[:-1].long()[batch]
    rows = forward_batch.req_pool_indices.long()[batch.to(device)]
    pages = req_to_token[rows, position.to(device) * PAGE_SIZE] // PAGE_SIZE

    out_page = forward_batch.out_cache_loc.long() // PAGE_SIZE
    first_page = pages[indptr[:-1].long().to(device)].long()
    open_slots = pool.open_slots.slot_of[out_page]
    sink_slots = pool.sink_slots.slot_of[first_page]
    offsets = (seq_lens - 1) % PAGE_SIZE
    table = PageTable(
        kv_indptr=indptr.to(device),
        kv_indices=pages,
        kv_last_page_len=(offsets + 1).int(),
        open_slots=open_slots.int(),
        sink_slots=sink_slots.int(),
    )
    closes = (forward_batch.seq_lens_cpu % PAGE_SIZE == 0).nonzero().squeeze(1)
    first = (forward_batch.seq_lens_cpu[closes] == PAGE_SIZE).nonzero().squeeze(1).to(device)
    closes = closes.to(device)
    closing = ClosingPages(
        rows=open_slots[closes],
        pages=out_page[closes],
        first=first,
        sink_slots=sink_slots[closes][first],
    )
    k_rows = open_slots.long() * 2 * PAGE_SIZE + offsets
    return DecodeMetadata(
        append=DecodeAppend(k_rows, k_rows + PAGE_SIZE, closing),
        plan=plan_decode(table, pool.plan.sink_tokens),
    )


def extend_metadata(
    forward_batch: Any,
    req_to_token: torch.Tensor,
    pool: PagedStore,
    quantized_prefill: bool,
) -> ExtendMetadata:
    """Prepare an extend step.

    Args:
        forward_batch: SGLang's `ForwardBatch`.
        req_to_token: int32 [requests, context], slots by position, fresh ones included.
        pool: Who owns which slot.
        quantized_prefill: See `KVQuantConfig.prefill`.
    """
    device = req_to_token.device
    rows = forward_batch.req_pool_indices.tolist()
    prefix_lens = list(forward_batch.extend_prefix_lens_cpu)
    extend_lens = list(forward_batch.extend_seq_lens_cpu)
    requests: list[ExtendRequest] = []
    touched_pages: list[torch.Tensor] = []
    touched_seq: list[int] = []  # of each touched page: sequence length it ends at, or its 64th
    resumed: list[int] = []
    first: list[int] = []
    tokens: list[torch.Tensor] = []
    q_start = touched_start = 0
    for row, prefix_len, extend_len in zip(rows, prefix_lens, extend_lens, strict=True):
        seq_len = prefix_len + extend_len
        pages = _page_of(req_to_token, row, int(num_pages_of(torch.tensor(seq_len))))
        first_touched = prefix_len // PAGE_SIZE
        requests.append(
            ExtendRequest(
                prefix_len=prefix_len,
                seq_len=seq_len,
                q_start=q_start,
                pages=pages[: closed_pages_read(prefix_len, seq_len, quantized_prefill)],
                touched_start=touched_start,
                sink_slot=int(pool.sink_slots.slot_of[pages[0]]),
            )
        )
        if prefix_len % PAGE_SIZE:
            resumed.append(touched_start)
        if first_touched == 0:
            first.append(touched_start)
        position = torch.arange(prefix_len, seq_len) - first_touched * PAGE_SIZE
        tokens.append(position + touched_start * PAGE_SIZE)
        touched_pages.append(pages[first_touched:])
        touched_seq += [
            min(PAGE_SIZE, seq_len - page * PAGE_SIZE) for page in range(first_touched, len(pages))
        ]
        q_start += extend_len
        touched_start += len(pages) - first_touched
    return ExtendMetadata(
        append=_extend_append(pool, touched_pages, touched_seq, resumed, first, tokens, device),
        requests=requests,
    )


def _extend_append(
    pool: PagedStore,
    touched_pages: list[torch.Tensor],
    rows_in_page: list[int],
    resumed: list[int],
    first: list[int],
    tokens: list[torch.Tensor],
    device: torch.device,
) -> ExtendAppend:
    """Sort the touched pages of a batch into resumed, closing and kept open."""

    def index(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    pages = torch.cat(touched_pages)
    slots = pool.open_slots.slot_of[pages]
    closing = [i for i, count in enumerate(rows_in_page) if count == PAGE_SIZE]
    closing_first = [n for n, i in enumerate(closing) if i in set(first)]
    kept_open = index([i for i, count in enumerate(rows_in_page) if count < PAGE_SIZE])
    token_place = torch.cat(tokens).to(device)
    closing_pages = pages[index(closing)]
    return ExtendAppend(
        num_touched=len(pages),
        touched=token_place // PAGE_SIZE,
        offsets=token_place % PAGE_SIZE,
        resumed=index(resumed),
        resumed_slots=slots[index(resumed)],
        kept_open=kept_open,
        kept_slots=slots[kept_open],
        closing=ClosingPages(
            rows=index(closing),
            pages=closing_pages,
            first=index(closing_first),
            sink_slots=pool.sink_slots.slot_of[closing_pages[index(closing_first)]],
        ),
    )
