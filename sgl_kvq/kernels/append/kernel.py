"""Append and close kernels: rows to staging, full pages to codes (Triton).

`_append_fwd_kernel` takes the fresh rows of an extend step, `_close_fwd_kernel` the pages that a
decode step has filled, of all layers at once. Launch both without fused multiply-adds; see
`quantize.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sgl_kvq.formats.quantize import LARGEST_MAGNITUDE
from sgl_kvq.kernels.append.quantize import quantize_rows
from sgl_kvq.kernels.common.layouts import PAGE, next_power_of_2, num_planes, plane_width

LARGEST: tl.constexpr = tl.constexpr(LARGEST_MAGNITUDE)
BLOCK: tl.constexpr = tl.constexpr(256)
# Index tensors, whose address must not make Triton compile another variant.
TOUCHED = (
    *("page_ptr", "slot_ptr", "sink_page_ptr", "prior_ptr", "first_ptr", "end_ptr", "start_ptr"),
    "is_first_ptr",
)
PAGE_TABLE = (
    *("kv_indptr_ptr", "kv_indices_ptr", "kv_last_page_len_ptr", "open_slots_ptr"),
    *("sink_pages_ptr", "displacements_ptr"),
)


@triton.jit
def _close_page(
    x, channel, valid, which: tl.constexpr, head, page, sink_page, is_first_page,
    pages_ptr, sink_rows_ptr, num_nonfinite_ptr,
    SINKS: tl.constexpr, CODING: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Write the codes of 64 rows [64, positions] of K (which = 0) or V (1), and their sinks."""
    D: tl.constexpr = SPEC.head_dim
    ROW: tl.constexpr = SPEC.num_kv_heads * D
    tokens = tl.arange(0, PAGE)
    wide = x.to(tl.float32)
    is_nonfinite = (tl.abs(wide) <= LARGEST) == 0
    count = tl.sum(tl.sum(is_nonfinite.to(tl.int32), axis=1), axis=0)
    if count > 0:
        wide = tl.where(wide == wide, tl.minimum(tl.maximum(wide, -LARGEST), LARGEST), 0.0)
        tl.atomic_add(num_nonfinite_ptr, count.to(tl.int64))
    num_sinks = tl.where(is_first_page, SINKS, 0)
    if SINKS > 0 and is_first_page:
        at = sink_page.to(tl.int64) * (SPEC.page_bytes // 2) + which * SINKS * ROW
        ptrs = sink_rows_ptr + at + tokens[:, None] * ROW + head * D + channel[None, :]
        mask = (tokens < SINKS)[:, None] & valid[None, :]
        tl.store(ptrs, wide.to(x.dtype), mask=mask)
    head_ptr = pages_ptr + page.to(tl.int64) * SPEC.page_bytes + head * SPEC.head_bytes
    if CODING.num_bits == 16:
        ptrs = (head_ptr + CODING.codes).to(tl.pointer_type(x.dtype))
        ptrs = ptrs + tokens[:, None] * D + channel[None, :]
        tl.store(ptrs, wide.to(x.dtype), mask=valid[None, :])
    else:
        quantize_rows(wide, channel, valid, num_sinks, head_ptr, CODING, which == 0, SPEC)


@triton.jit
def _positions(CODING: tl.constexpr, SPEC: tl.constexpr):
    """Channels of a tile's positions, and which positions hold one; see `quantize_rows`."""
    WIDTH: tl.constexpr = plane_width(SPEC, CODING)
    PADDED: tl.constexpr = next_power_of_2(WIDTH)
    position = tl.arange(0, num_planes(CODING) * PADDED)
    return (position // PADDED) * WIDTH + position % PADDED, position % PADDED < WIDTH


@triton.jit
def _append_tensor(
    fresh_ptr, stride_t, stride_h, which: tl.constexpr, head, page, slot, sink_page, prior,
    first, end, start, is_first_page,
    pages_ptr, open_rows_ptr, prior_rows_ptr, sink_rows_ptr, num_nonfinite_ptr,
    SINKS: tl.constexpr, CODING: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """One page's fresh rows first to end - 1 of K (which = 0) or V (which = 1) of one head."""
    D: tl.constexpr = SPEC.head_dim
    ROW: tl.constexpr = SPEC.num_kv_heads * D
    channel, valid = _positions(CODING, SPEC)
    tokens = tl.arange(0, PAGE)
    is_fresh = (tokens >= first) & (tokens < end)
    rows = tokens.to(tl.int64)[:, None]
    fresh = fresh_ptr + (start - first + rows) * stride_t + head * stride_h + channel[None, :]
    x = tl.load(fresh, mask=is_fresh[:, None] & valid[None, :], other=0.0)
    in_slot = which * PAGE * ROW + rows * ROW + head * D + channel[None, :]
    if end == PAGE:
        ptrs = prior_rows_ptr + prior.to(tl.int64) * (2 * PAGE * ROW) + in_slot
        earlier = tl.load(ptrs, mask=(tokens < first)[:, None] & valid[None, :], other=0.0)
        x = tl.where((tokens < first)[:, None], earlier, x)
        _close_page(
            x, channel, valid, which, head, page, sink_page, is_first_page,
            pages_ptr, sink_rows_ptr, num_nonfinite_ptr, SINKS, CODING, SPEC,
        )  # fmt: skip
    else:
        ptrs = open_rows_ptr + slot.to(tl.int64) * (2 * PAGE * ROW) + in_slot
        tl.store(ptrs, x, mask=is_fresh[:, None] & valid[None, :])


@triton.jit(do_not_specialize_on_alignment=TOUCHED)
def _append_fwd_kernel(
    k_ptr, v_ptr, stride_kt, stride_kh, stride_vt, stride_vh,
    page_ptr, slot_ptr, sink_page_ptr, prior_ptr, first_ptr, end_ptr, start_ptr, is_first_ptr,
    pages_ptr, open_rows_ptr, prior_rows_ptr, sink_rows_ptr, num_nonfinite_ptr,
    SINKS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """code = clip(round((x - m) / s)) for the pages that fill; rows to staging for the others.

    One program for each page that gets rows, KV head, and K or V.
    """
    touched = tl.program_id(0)
    head = tl.program_id(1)
    page = tl.load(page_ptr + touched)
    slot = tl.load(slot_ptr + touched)
    sink_page = tl.load(sink_page_ptr + touched)
    prior = tl.load(prior_ptr + touched)
    first = tl.load(first_ptr + touched)
    end = tl.load(end_ptr + touched)
    start = tl.load(start_ptr + touched)
    is_first_page = tl.load(is_first_ptr + touched) != 0
    K: tl.constexpr = SPEC.k
    V: tl.constexpr = SPEC.v
    if end == 0:  # padding
        return
    if tl.program_id(2) == 0:
        _append_tensor(
            k_ptr, stride_kt, stride_kh, 0, head, page, slot, sink_page, prior,
            first, end, start, is_first_page,
            pages_ptr, open_rows_ptr, prior_rows_ptr, sink_rows_ptr, num_nonfinite_ptr,
            SINKS, K, SPEC,
        )  # fmt: skip
    else:
        _append_tensor(
            v_ptr, stride_vt, stride_vh, 1, head, page, slot, sink_page, prior,
            first, end, start, is_first_page,
            pages_ptr, open_rows_ptr, prior_rows_ptr, sink_rows_ptr, num_nonfinite_ptr,
            SINKS, V, SPEC,
        )  # fmt: skip


@triton.jit
def _close_slot(
    which: tl.constexpr, head, page, slot, sink_page, is_first_page,
    pages_ptr, open_rows_ptr, sink_rows_ptr, num_nonfinite_ptr,
    SINKS: tl.constexpr, CODING: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Quantize K (which = 0) or V (which = 1) of one head of a full open slot."""
    ROW: tl.constexpr = SPEC.num_kv_heads * SPEC.head_dim
    channel, valid = _positions(CODING, SPEC)
    rows = tl.arange(0, PAGE)[:, None]
    rows_ptr = open_rows_ptr + slot.to(tl.int64) * (2 * PAGE * ROW) + which * PAGE * ROW
    ptrs = rows_ptr + rows * ROW + head * SPEC.head_dim + channel[None, :]
    x = tl.load(ptrs, mask=valid[None, :], other=0.0)
    _close_page(
        x, channel, valid, which, head, page, sink_page, is_first_page,
        pages_ptr, sink_rows_ptr, num_nonfinite_ptr, SINKS, CODING, SPEC,
    )  # fmt: skip


@triton.jit
def _full_requests(kv_last_page_len_ptr, batch, nth):
    """How many requests have a full last page, and which of them is the nth."""
    count = tl.zeros([], tl.int32)
    found = tl.zeros([], tl.int32)
    for start in range(0, batch, BLOCK):
        request = start + tl.arange(0, BLOCK)
        rows = tl.load(kv_last_page_len_ptr + request, mask=request < batch, other=0)
        is_full = (rows == PAGE).to(tl.int32)
        rank = count + tl.cumsum(is_full, axis=0) - is_full
        found += tl.sum(tl.where((is_full == 1) & (rank == nth), request, 0), axis=0)
        count += tl.sum(is_full, axis=0)
    return count, found


@triton.jit(do_not_specialize=("batch", "num_layers"), do_not_specialize_on_alignment=PAGE_TABLE)
def _close_fwd_kernel(
    displacements_ptr, pages_ptr, open_rows_ptr, sink_rows_ptr,
    kv_indptr_ptr, kv_indices_ptr, kv_last_page_len_ptr, open_slots_ptr, sink_pages_ptr,
    num_nonfinite_ptr, batch, num_layers,
    SINKS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """code = clip(round((x - m) / s)) for the full last pages of a batch, in every layer.

    One piece of work is K or V of one head, layer and page; programs take them in turn.
    `displacements` [3, num_layers] says how far, in elements, a layer's pages, open rows and sink
    rows lie from those given.
    """
    K: tl.constexpr = SPEC.k
    V: tl.constexpr = SPEC.v
    pieces = num_layers * SPEC.num_kv_heads * 2
    piece = tl.program_id(0)
    count, request = _full_requests(kv_last_page_len_ptr, batch, piece // pieces)
    while piece < count * pieces:
        begin = tl.load(kv_indptr_ptr + request)
        end = tl.load(kv_indptr_ptr + request + 1)
        page = tl.load(kv_indices_ptr + end - 1)
        slot = tl.load(open_slots_ptr + request)
        sink_page = tl.load(sink_pages_ptr + request)
        layer = piece % pieces // (SPEC.num_kv_heads * 2)
        head = piece // 2 % SPEC.num_kv_heads
        at = displacements_ptr + layer
        to_pages = tl.multiple_of(tl.load(at), 16)
        to_open = tl.multiple_of(tl.load(at + num_layers), 16)
        to_sinks = tl.multiple_of(tl.load(at + 2 * num_layers), 16)
        if piece % 2 == 0:
            _close_slot(
                0, head, page, slot, sink_page, end - begin == 1,
                pages_ptr + to_pages, open_rows_ptr + to_open, sink_rows_ptr + to_sinks,
                num_nonfinite_ptr, SINKS, K, SPEC,
            )  # fmt: skip
        else:
            _close_slot(
                1, head, page, slot, sink_page, end - begin == 1,
                pages_ptr + to_pages, open_rows_ptr + to_open, sink_rows_ptr + to_sinks,
                num_nonfinite_ptr, SINKS, V, SPEC,
            )  # fmt: skip
        piece += tl.num_programs(0)
        _, request = _full_requests(kv_last_page_len_ptr, batch, piece // pieces)
