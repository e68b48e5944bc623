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

from sgl_kvq.kernels.common.gluon import (
    barrier,
    gl,
    jit,
)
from sgl_kvq.kernels.common.layouts import (
    PAGE,
    lane_sum_layout,
    mma_layout,
    num_groups,
    num_planes,
    overlaps,
    plane_width,
    value_rows,
)
from sgl_kvq.kernels.common.tiles import (
    CODE_UNIT,
    allocate_page,
)
from sgl_kvq.kernels.decode.configs import ROWS_PER_UNIT
from sgl_kvq.kernels.decode.operands import (
    code_queries,
    extra_queries,
    min_queries,
    power_of_2_above,
    row_queries,
    value_unit,
)
from sgl_kvq.kernels.decode.pages import (
    attend_pages,
    start_pages,
)
from sgl_kvq.kernels.decode.rows import (
    attend_rows,
    load_fresh_row,
    prefetch_rows,
    store_fresh_row,
)

CHUNK: tl.constexpr = tl.constexpr(ROWS_PER_UNIT)
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)
# Arguments whose value or address must not make Triton compile another variant.
PAGE_TABLE = (
    *("kv_indptr_ptr", "kv_indices_ptr", "kv_last_page_len_ptr", "open_slots_ptr"),
    "sink_slots_ptr",
)


def _first_unit(pages, request, TAIL: tl.constexpr, KV_HEADS: tl.constexpr):
    """Where the units of a request begin, `pages` pages after the line's start."""
    return (pages + request * (TAIL - 1)).to(tl.int64) * KV_HEADS


first_unit_of = jit(_first_unit)
_first_unit_of = triton.jit(_first_unit)  # for the merge, which is plain Triton


@jit
def store_partial(
    out_ptr, stat_ptr, slot, m_run, lane_sum, offsets, acc,
    HEADS: tl.constexpr, GQA: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Write unnormalized output [GQA, head_dim], shift and sum [2, GQA] of a partial result."""
    COLS: tl.constexpr = gl.SliceLayout(0, mma_layout())
    heads = gl.arange(0, HEADS, COLS)
    total = gl.convert_layout(gl.sum(lane_sum, axis=0), COLS)
    stat_ptr += slot * (2 * GQA)
    gl.store(stat_ptr + heads, m_run, mask=heads < GQA)
    gl.store(stat_ptr + GQA + heads, total, mask=heads < GQA)
    WIDTH: tl.constexpr = plane_width(SPEC, SPEC.v)
    rows = gl.arange(0, value_rows(SPEC), gl.SliceLayout(1, mma_layout()))
    out_ptr += slot.to(gl.int64) * (GQA * SPEC.head_dim)
    for plane in tl.static_range(num_planes(SPEC.v)):
        out = acc[plane] * value_unit(SPEC, plane)
        channels = plane * WIDTH + rows
        for group in tl.static_range(len(offsets)):
            if overlaps(SPEC, SPEC.v, plane, group):
                low = gl.convert_layout(gl.sum(offsets[group], axis=0), COLS)
                inside = channels // SPEC.v.group_channels == group
                out = out + gl.where(inside[:, None], low[None, :], 0.0)
        ptrs = out_ptr + heads[None, :] * SPEC.head_dim + channels[:, None]
        gl.store(ptrs, out, mask=(rows < WIDTH)[:, None] & (heads < GQA)[None, :])


@jit
def _grid_control(ASM: tl.constexpr):
    """Run an instruction of programmatic dependent launch, as an operation that returns 0."""
    return gl.inline_asm_elementwise(ASM, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@jit
def attend_segment(
    first_unit, end_unit, request, head, num_closed,
    q_ptr, q_codes_ptr, stride_q_b, stride_q_h, stride_qc_b, stride_qc_h,
    fresh_k_ptr, fresh_v_ptr, pages_ptr, open_rows_ptr, sink_rows_ptr,
    kv_indices_ptr, first_page_index, last_page_len, open_slot, sink_slot,
    out_ptr, stat_ptr, slot, sm_scale_log2, buffers,
    FRESH: tl.constexpr, SINKS: tl.constexpr, HEADS: tl.constexpr, GQA: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """One program's share of one (request, KV head)."""
    COLS: tl.constexpr = gl.SliceLayout(0, mma_layout())
    page_ptr = pages_ptr + head * SPEC.head_bytes
    indices_ptr = kv_indices_ptr + first_page_index
    end_page = gl.minimum(end_unit, num_closed)
    if not SPEC.k.is_raw:
        # On their way while the queries are prepared.
        here, coming = start_pages(
            first_unit, end_page, indices_ptr, page_ptr, buffers, STAGES, SPEC
        )
    if PDL:
        # Closed pages and tables are older than the kernel before this one; all else may be its
        # work. Addresses depend on the wait, so that no load is moved ahead of it; times 16, so
        # that the compiler still knows their alignment.
        waited = 16 * _grid_control("griddepcontrol.wait; mov.b32 $0, 0;")
        q_ptr += waited
        q_codes_ptr += waited
        fresh_k_ptr += waited
        fresh_v_ptr += waited
        open_rows_ptr += waited
        sink_rows_ptr += waited
    q_ptr += request.to(gl.int64) * stride_q_b + head * GQA * stride_q_h
    q_codes_ptr += request.to(gl.int64) * stride_qc_b + head * GQA * stride_qc_h
    if FRESH:
        # Stored by the program whose piece has the unit with this row, once the queries are here.
        newest = num_closed + (last_page_len - 1) // CHUNK
        stores = (first_unit <= newest) & (newest < end_unit)
        k_row, v_row = load_fresh_row(fresh_k_ptr, fresh_v_ptr, stores, SPEC)
    q_rows = row_queries(q_ptr, stride_q_h, HEADS, GQA, SPEC)
    ROW: tl.constexpr = SPEC.num_kv_heads * SPEC.head_dim
    open_ptr = open_rows_ptr + open_slot.to(gl.int64) * (2 * PAGE * ROW) + head * SPEC.head_dim
    sink_ptr = sink_rows_ptr + sink_slot.to(gl.int64) * (2 * SINKS * ROW) + head * SPEC.head_dim
    if end_unit > num_closed:
        prefetch_rows(open_ptr, last_page_len, SPEC)
    if FRESH:
        store_fresh_row(open_ptr + (last_page_len - 1) * ROW, k_row, v_row, stores, SPEC)
        barrier()  # other lanes read it below
    m_run = gl.full([HEADS], LOWEST, gl.float32, COLS)
    lane_sum = gl.zeros([8, HEADS], gl.float32, lane_sum_layout(HEADS))
    offsets = ()
    if not SPEC.v.per_channel and not SPEC.v.is_raw:
        for _ in tl.static_range(num_groups(SPEC, SPEC.v)):
            offsets = offsets + (gl.zeros([8, HEADS], gl.float32, lane_sum_layout(HEADS)),)
    acc = ()
    for _ in tl.static_range(num_planes(SPEC.v)):
        acc = acc + (gl.zeros([value_rows(SPEC), HEADS], gl.float32, mma_layout()),)
    if SPEC.k.is_raw:
        for index in range(first_unit, end_page):
            page = gl.load(indices_ptr + index).to(gl.int64)
            rows_ptr = page_ptr + page * SPEC.page_bytes
            k_ptr = (rows_ptr + SPEC.k.codes).to(open_rows_ptr.dtype)
            v_ptr = (rows_ptr + SPEC.v.codes).to(open_rows_ptr.dtype)
            for chunk in range(0, PAGE, CHUNK):
                masked = SINKS - chunk if index == 0 else 0
                m_run, lane_sum, offsets, acc = attend_rows(
                    k_ptr + chunk * SPEC.head_dim, v_ptr + chunk * SPEC.head_dim, SPEC.head_dim,
                    masked, 16, q_rows, sm_scale_log2, m_run, lane_sum, offsets, acc, HEADS, SPEC,
                )  # fmt: skip
    else:
        q = q_rows
        if SPEC.k.rotation > 1:
            q = row_queries(q_codes_ptr, stride_qc_h, HEADS, GQA, SPEC)
        norm = power_of_2_above(gl.max(gl.abs(q.to(gl.float32)), axis=0))
        q_codes = code_queries(q_codes_ptr, stride_qc_h, 1.0 / norm, HEADS, GQA, SPEC)
        q_extra = extra_queries(q_codes_ptr, stride_qc_h, 1.0 / norm, HEADS, GQA, SPEC)
        q_mins = min_queries(q, sm_scale_log2, SPEC)
        unit = gl.convert_layout(norm, COLS) * (CODE_UNIT * sm_scale_log2)
        m_run, lane_sum, offsets, acc = attend_pages(
            first_unit, end_page, here, coming, indices_ptr, page_ptr, buffers,
            q_codes, q_extra, q_mins, unit, sm_scale_log2, m_run, lane_sum, offsets, acc,
            SINKS, HEADS, STAGES, SPEC,
        )  # fmt: skip

    for unit in range(gl.maximum(first_unit, num_closed), end_unit):
        chunk = unit - num_closed
        k_ptr = open_ptr + chunk * (CHUNK * ROW)
        to_v = PAGE * ROW
        rows = last_page_len - chunk * CHUNK
        if chunk >= PAGE // CHUNK:
            k_ptr = sink_ptr
            to_v = SINKS * ROW
            rows = SINKS if (num_closed > 0) & (chunk == PAGE // CHUNK) else 0
        if rows > 0:
            m_run, lane_sum, offsets, acc = attend_rows(
                k_ptr, k_ptr + to_v, ROW, 0, rows, q_rows, sm_scale_log2,
                m_run, lane_sum, offsets, acc, HEADS, SPEC,
            )  # fmt: skip
    store_partial(out_ptr, stat_ptr, slot, m_run, lane_sum, offsets, acc, HEADS, GQA, SPEC)


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
    kv_indptr_ptr, kv_indices_ptr, kv_last_page_len_ptr, open_slots_ptr, sink_slots_ptr,
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
            attend_segment(
                first, last, request, head, num_closed,
                q_ptr, q_codes_ptr, stride_q_b, stride_q_h, stride_qc_b, stride_qc_h,
                k_ptr + request.to(gl.int64) * stride_k_b + head * stride_k_h,
                v_ptr + request.to(gl.int64) * stride_v_b + head * stride_v_h,
                pages_ptr, open_rows_ptr, sink_rows_ptr,
                kv_indices_ptr, first_page, gl.load(kv_last_page_len_ptr + request),
                gl.load(open_slots_ptr + request), gl.load(sink_slots_ptr + request),
                out_ptr, stat_ptr, program + request * KV_HEADS + head, sm_scale_log2, buffers,
                FRESH, SINKS, HEADS, GQA, STAGES, PDL, SPEC,
            )  # fmt: skip
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
