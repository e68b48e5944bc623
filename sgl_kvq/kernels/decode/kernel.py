"""Decode attention over code pages: split-KV kernel and merge, in Gluon and Triton.

One warp a program. Scores are computed transposed, S^T [64 tokens, heads] = codes x (q * scales),
and so is the output, O^T [channels, heads] = codes x (probabilities * scales), so that the codes
are the tensor core's big left operand and the query heads of a KV head its 8 (or 16) columns.

Work is cut into units of one head: a closed page, 16 rows of the open page, or the sink rows. All
units of a batch lie on one line, request by request and head by head, and each program takes an
equal piece of it, so that one long request and many ragged ones fill the GPU alike.

A program leaves one partial result for each (request, head) its piece touches, in slot
`program + request * num_kv_heads + head`: along the line one of the two grows at each new partial,
so slots never collide.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sgl_kvq.kernels.common.gluon import gl, jit
from sgl_kvq.kernels.decode.operands import code_operands, row_queries
from sgl_kvq.kernels.decode.page_buffers import allocate_page
from sgl_kvq.kernels.decode.pages import attend_pages, start_pages
from sgl_kvq.kernels.decode.rows import (
    attend_raw_pages,
    attend_tail,
    load_fresh_row,
    owns_fresh_row,
    prefetch_open_page,
    store_fresh_row,
)
from sgl_kvq.kernels.decode.segment import FreshRow, Queries, Segment, Storage
from sgl_kvq.kernels.decode.softmax import empty_softmax, store_partial

# Arguments whose value or address must not make Triton compile another variant.
PAGE_TABLE = (
    *("kv_indptr_ptr", "kv_indices_ptr", "kv_last_page_len_ptr", "open_slots_ptr"),
    "sink_pages_ptr",
)


def _first_unit(pages, request, TAIL: tl.constexpr, KV_HEADS: tl.constexpr):
    """Where the units of a request begin, `pages` pages after the line's start."""
    return (pages + request * (TAIL - 1)).to(tl.int64) * KV_HEADS


first_unit_of = jit(_first_unit)
_first_unit_of = triton.jit(_first_unit)  # for the merge, which is plain Triton


@jit
def _grid_control(ASM: tl.constexpr):
    """Run an instruction of programmatic dependent launch, as an operation that returns 0."""
    return gl.inline_asm_elementwise(ASM, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@jit
def _wait_for_previous_kernel(storage, queries, fresh):
    """Wait for the kernel before this one, which may write all of these but closed pages.

    Returns:
        The arguments. Addresses depend on the wait, so that no load is moved ahead of it; times 16,
        so that the compiler still knows their alignment.
    """
    waited = 16 * _grid_control("griddepcontrol.wait; mov.b32 $0, 0;")
    return (
        Storage(
            storage.pages_ptr, storage.open_rows_ptr + waited, storage.sink_rows_ptr + waited
        ),
        Queries(
            queries.rows_ptr + waited, queries.rows_stride,
            queries.codes_ptr + waited, queries.codes_stride,
        ),
        FreshRow(fresh.k_ptr + waited, fresh.v_ptr + waited),
    )  # fmt: skip


@jit
def _attend_segment(
    segment, storage, queries, fresh, buffers, sm_scale_log2,
    FRESH: tl.constexpr, SINKS: tl.constexpr, HEADS: tl.constexpr, GQA: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Attention of one KV head's queries over a segment's units: a `SoftmaxState`."""
    if not SPEC.k.is_raw:
        # Copied while the queries are prepared; closed pages are older than the previous kernel.
        cursor = start_pages(segment, storage, buffers, STAGES, SPEC)
    if PDL:
        storage, queries, fresh = _wait_for_previous_kernel(storage, queries, fresh)
    if FRESH:
        is_owner = owns_fresh_row(segment)
        k_row, v_row = load_fresh_row(fresh, is_owner, SPEC)
    q_rows = row_queries(queries.rows_ptr, queries.rows_stride, HEADS, GQA, SPEC)
    if segment.end > segment.num_closed:
        prefetch_open_page(segment, storage, SPEC)
    if FRESH:
        store_fresh_row(k_row, v_row, segment, storage, is_owner, SPEC)
    state = empty_softmax(HEADS, SPEC)
    if SPEC.k.is_raw:
        state = attend_raw_pages(segment, storage, q_rows, sm_scale_log2, state, SINKS, HEADS, SPEC)
    else:
        q_codes = code_operands(queries, q_rows, sm_scale_log2, HEADS, GQA, SPEC)
        state = attend_pages(
            segment, storage, cursor, buffers, q_codes, sm_scale_log2, state,
            SINKS, HEADS, STAGES, SPEC,
        )  # fmt: skip
    return attend_tail(segment, storage, q_rows, sm_scale_log2, state, SINKS, HEADS, SPEC)


@jit
def _request_of_unit(kv_indptr_ptr, batch, unit, TAIL: tl.constexpr, SPEC: tl.constexpr):
    """The last request whose units begin at or before `unit`."""
    LAYOUT: tl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    count = 0
    for start in range(0, batch, 256):
        requests = start + gl.arange(0, 256, LAYOUT)
        pages = gl.load(kv_indptr_ptr + requests, mask=requests < batch, other=0)
        begin = first_unit_of(pages, requests, TAIL, SPEC.num_kv_heads)
        count += gl.sum(((begin <= unit) & (requests < batch)).to(gl.int32), axis=0)
    return count - 1


@jit(do_not_specialize=("batch",), do_not_specialize_on_alignment=PAGE_TABLE)
def _decode_fwd_kernel(
    q_ptr, q_codes_ptr, stride_q_b, stride_q_h, stride_qc_b, stride_qc_h,
    k_ptr, v_ptr, stride_k_b, stride_k_h, stride_v_b, stride_v_h,
    pages_ptr, open_rows_ptr, sink_rows_ptr,
    kv_indptr_ptr, kv_indices_ptr, kv_last_page_len_ptr, open_slots_ptr, sink_pages_ptr,
    out_ptr, stat_ptr, batch, sm_scale_log2,
    FRESH: tl.constexpr, SINKS: tl.constexpr, HEADS: tl.constexpr, GQA: tl.constexpr,
    STAGES: tl.constexpr, TAIL: tl.constexpr, PDL: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Attend to one piece of the line of units; see the module's docstring.

    out = sum_t p_t v_t with p_t = 2^(q . k_t * sm_scale_log2 - shift), unnormalized, for each
    (request, head) of the piece; stat = (shift, sum_t p_t). With FRESH the newest row of a request
    comes from k and v and is stored in the open slot.
    """
    KV_HEADS: tl.constexpr = SPEC.num_kv_heads
    if PDL:
        # The merge may be launched and wait on the device, while this grid still runs.
        _grid_control("griddepcontrol.launch_dependents; mov.b32 $0, 0;")
    program = gl.program_id(0)
    total = first_unit_of(gl.load(kv_indptr_ptr + batch), batch, TAIL, KV_HEADS)
    programs = gl.minimum(gl.num_programs(0).to(gl.int64), total)
    unit = program * total // programs
    end = gl.minimum((program + 1) * total // programs, total)
    storage = Storage(pages_ptr, open_rows_ptr, sink_rows_ptr)
    if SPEC.k.is_raw:
        buffers = ()
    else:
        buffers = allocate_page(STAGES, SPEC)
    if unit < end:
        request = _request_of_unit(kv_indptr_ptr, batch, unit, TAIL, SPEC)
        while unit < end:
            first_page = gl.load(kv_indptr_ptr + request)
            num_closed = gl.load(kv_indptr_ptr + request + 1) - first_page - 1
            length = num_closed + TAIL
            offset = (unit - first_unit_of(first_page, request, TAIL, KV_HEADS)).to(gl.int32)
            head = offset // length
            first = offset % length
            last = gl.minimum(length, first + (end - unit).to(gl.int32))
            segment = Segment(
                request, head, first, last, num_closed, kv_indices_ptr + first_page,
                gl.load(kv_last_page_len_ptr + request),
                gl.load(open_slots_ptr + request), gl.load(sink_pages_ptr + request),
            )  # fmt: skip
            row = request.to(gl.int64)
            queries = Queries(
                q_ptr + row * stride_q_b + head * GQA * stride_q_h, stride_q_h,
                q_codes_ptr + row * stride_qc_b + head * GQA * stride_qc_h, stride_qc_h,
            )  # fmt: skip
            fresh = FreshRow(
                k_ptr + row * stride_k_b + head * stride_k_h,
                v_ptr + row * stride_v_b + head * stride_v_h,
            )
            state = _attend_segment(
                segment, storage, queries, fresh, buffers, sm_scale_log2,
                FRESH, SINKS, HEADS, GQA, STAGES, PDL, SPEC,
            )  # fmt: skip
            slot = program + request * KV_HEADS + head
            store_partial(out_ptr, stat_ptr, slot, state, HEADS, GQA, SPEC)
            unit += last - first
            if head == KV_HEADS - 1 and last == length:
                request += 1


@triton.jit(do_not_specialize=("batch", "num_programs"), do_not_specialize_on_alignment=PAGE_TABLE)
def _decode_merge_kernel(
    out_ptr, stat_ptr, kv_indptr_ptr, final_ptr, lse_ptr, batch, num_programs,
    GQA: tl.constexpr, HEAD_DIM: tl.constexpr, KV_HEADS: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of one (request, query head); one program each.

    out = sum_i 2^(m_i - M) out_i / L, L = sum_i 2^(m_i - M) l_i, lse = M + log2 L.
    """
    request = tl.program_id(0)
    head = tl.program_id(1)
    kv_head = head // GQA
    first_page = tl.load(kv_indptr_ptr + request)
    length = tl.load(kv_indptr_ptr + request + 1) - first_page - 1 + TAIL
    total = _first_unit_of(tl.load(kv_indptr_ptr + batch), batch, TAIL, KV_HEADS)
    unit = _first_unit_of(first_page, request, TAIL, KV_HEADS) + kv_head * length
    num_programs = tl.minimum(num_programs.to(tl.int64), total)
    # Program w works on units w * total // num_programs and on: the last w that begins at `unit`.
    first = (((unit + 1) * num_programs - 1) // total).to(tl.int32)
    end = (((unit + length) * num_programs - 1) // total + 1).to(tl.int32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    offs_d = tl.arange(0, BLOCK_D)
    offs_s = tl.arange(0, BLOCK_S)
    mask_d = offs_d < HEAD_DIM
    m = float("-inf")
    weight = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, end, BLOCK_S):
        mask_s = start + offs_s < end
        slots = (start + offs_s + request * KV_HEADS + kv_head).to(tl.int64)  # [BLOCK_S]
        stat = stat_ptr + slots * (2 * GQA) + head % GQA
        m_i = tl.load(stat, mask=mask_s, other=float("-inf"))
        l_i = tl.load(stat + GQA, mask=mask_s, other=0.0)
        rows = out_ptr + (slots * GQA + head % GQA)[:, None] * HEAD_DIM + offs_d[None, :]
        out_i = tl.load(rows, mask=mask_s[:, None] & mask_d[None, :], other=0.0)  # [S, D]
        m_new = tl.maximum(m, tl.max(m_i, axis=0))
        alpha = tl.exp2(m - m_new)
        beta = tl.exp2(m_i - m_new)
        weight = weight * alpha + tl.sum(beta * l_i, axis=0)
        acc = acc * alpha + tl.sum(beta[:, None] * out_i, axis=0)
        m = m_new
    at = request.to(tl.int64) * (GQA * KV_HEADS) + head
    out = (acc / weight).to(final_ptr.dtype.element_ty)
    tl.store(final_ptr + at * HEAD_DIM + offs_d, out, mask=mask_d)
    tl.store(lse_ptr + at, m + tl.log2(weight))
