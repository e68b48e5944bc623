"""Attention to 16-bit rows: the open page, sink tokens, pages that were never quantized."""

from __future__ import annotations

import triton.language as tl

from sgl_kvq.kernels.common.gluon import INTERPRET, barrier, gl, jit, mma_v2
from sgl_kvq.kernels.common.layouts import (
    PAGE,
    a_layout,
    b_layout,
    mma_layout,
    next_power_of_2,
    num_planes,
    padded_dim,
    plane_width,
    row_layout,
    value_row_layout,
    value_rows,
)
from sgl_kvq.kernels.decode.configs import ROWS_PER_UNIT
from sgl_kvq.kernels.decode.softmax import HEADROOM, SoftmaxState, rescale, value_unit
from sgl_kvq.kernels.decode.tiles import columns_in_order, sum_in_lane, transpose_blocks

CHUNK: tl.constexpr = tl.constexpr(ROWS_PER_UNIT)


@jit
def open_page_ptr(segment, storage, SPEC: tl.constexpr):
    """Where the first K row of a segment's open page lies."""
    ROW: tl.constexpr = SPEC.num_kv_heads * SPEC.head_dim
    slot_ptr = storage.open_rows_ptr + segment.open_slot.to(gl.int64) * (2 * PAGE * ROW)
    return slot_ptr + segment.head * SPEC.head_dim


@jit
def prefetch_open_page(segment, storage, SPEC: tl.constexpr):
    """Start fetching the K and V rows of a segment's open page into the L2 cache."""
    if not INTERPRET:
        ROW: tl.constexpr = SPEC.num_kv_heads * SPEC.head_dim
        LINES: tl.constexpr = next_power_of_2((2 * SPEC.head_dim + 127) // 128)
        LAYOUT: tl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        line = gl.arange(0, 2 * PAGE * LINES, LAYOUT)
        row = gl.minimum(line // LINES % PAGE, segment.last_page_len - 1)
        channel = gl.minimum(line % LINES * 64, SPEC.head_dim - 1)
        ptrs = open_page_ptr(segment, storage, SPEC)
        ptrs = ptrs + (line // (LINES * PAGE) * PAGE + row) * ROW + channel
        gl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [ptrs.to(gl.int64)],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )


@jit
def owns_fresh_row(segment):
    """Whether the segment has the unit with the newest row, and so must store it."""
    newest = segment.num_closed + (segment.last_page_len - 1) // CHUNK
    return (segment.first <= newest) & (newest < segment.end)


@jit
def load_fresh_row(fresh, wanted, SPEC: tl.constexpr):
    """K and V [padded_dim] of the newest row, if it is wanted."""
    channels = gl.arange(0, padded_dim(SPEC), gl.BlockedLayout([4], [32], [1], [0]))
    mask = (channels < SPEC.head_dim) & wanted
    return gl.load(fresh.k_ptr + channels, mask=mask), gl.load(fresh.v_ptr + channels, mask=mask)


@jit
def store_fresh_row(k, v, segment, storage, wanted, SPEC: tl.constexpr):
    """Put the newest row into the open slot, if it is wanted; all lanes may read it then."""
    ROW: tl.constexpr = SPEC.num_kv_heads * SPEC.head_dim
    row_ptr = open_page_ptr(segment, storage, SPEC) + (segment.last_page_len - 1) * ROW
    channels = gl.arange(0, padded_dim(SPEC), gl.BlockedLayout([4], [32], [1], [0]))
    mask = (channels < SPEC.head_dim) & wanted
    gl.store(row_ptr + channels, k, mask=mask)
    gl.store(row_ptr + PAGE * ROW + channels, v, mask=mask)
    barrier()


@jit
def _load_value_rows(v_ptr, stride, first, end, SPEC: tl.constexpr):
    """Rows first to end - 1 of 16 rows of V, by plane, as left operands [value_rows, 16]."""
    WIDTH: tl.constexpr = plane_width(SPEC, SPEC.v)
    TILE: tl.constexpr = value_rows(SPEC)
    LAYOUT: tl.constexpr = value_row_layout(TILE)
    rows = gl.arange(0, 16, gl.SliceLayout(1, LAYOUT))
    channels = gl.arange(0, TILE, gl.SliceLayout(0, LAYOUT))
    mask = ((rows >= first) & (rows < end))[:, None] & (channels < WIDTH)[None, :]
    operands = ()
    for plane in tl.static_range(num_planes(SPEC.v)):
        at = v_ptr + rows[:, None] * stride + (plane * WIDTH + channels)[None, :]
        v = transpose_blocks(gl.load(at, mask=mask, other=0.0), 16, TILE)
        v = gl.permute(gl.reshape(v, [2, 8, TILE // 8, 8]), [2, 1, 0, 3])
        v = gl.convert_layout(gl.reshape(v, [TILE, 16]), a_layout(), assert_trivial=True)
        operands = operands + (v,)
    return operands


@jit
def _attend_rows(
    k_ptr, v_ptr, stride, first, end, q_rows, sm_scale_log2, state,
    HEADS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Add up to 16 rows of 16 bits: rows first to end - 1 of those at k_ptr and v_ptr."""
    DIM: tl.constexpr = padded_dim(SPEC)
    LAYOUT: tl.constexpr = row_layout(DIM)
    rows = gl.arange(0, 16, gl.SliceLayout(1, LAYOUT))
    channels = gl.arange(0, DIM, gl.SliceLayout(0, LAYOUT))
    mask = ((rows >= first) & (rows < end))[:, None] & (channels < SPEC.head_dim)[None, :]
    k = gl.load(k_ptr + rows[:, None] * stride + channels[None, :], mask=mask, other=0.0)
    values = _load_value_rows(v_ptr, stride, first, end, SPEC)
    k = gl.convert_layout(columns_in_order(k, 16, DIM), a_layout(), assert_trivial=True)
    s = mma_v2(k, q_rows, gl.zeros([16, HEADS], gl.float32, mma_layout())) * sm_scale_log2
    row = gl.arange(0, 16, gl.SliceLayout(1, mma_layout()))
    s = gl.where(((row >= first) & (row < end))[:, None], s, float("-inf"))
    state = rescale(state, gl.max(s, axis=0) - HEADROOM, HEADS)
    p = gl.exp2(s - state.m[None, :])
    lane_sum = state.lane_sum + sum_in_lane(p, 16, HEADS)
    p = transpose_blocks(p.to(k_ptr.dtype.element_ty), 16, HEADS)
    p = gl.permute(gl.reshape(p, [2, 8, HEADS // 8, 8]), [0, 3, 2, 1])
    p = gl.convert_layout(gl.reshape(p, [16, HEADS]), b_layout(), assert_trivial=True)
    acc = ()
    for plane in tl.static_range(num_planes(SPEC.v)):
        product = gl.zeros([value_rows(SPEC), HEADS], gl.float32, mma_layout())
        product = mma_v2(values[plane], p, product) * (1.0 / value_unit(SPEC, plane))
        acc = acc + (state.acc[plane] + product,)
    return SoftmaxState(state.m, lane_sum, state.offsets, acc)


@jit
def attend_raw_pages(
    segment, storage, q_rows, sm_scale_log2, state,
    SINKS: tl.constexpr, HEADS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Add the segment's closed pages of a format that stores 16-bit rows."""
    row_type: tl.constexpr = storage.open_rows_ptr.dtype
    pages_ptr = storage.pages_ptr + segment.head * SPEC.head_bytes
    for index in range(segment.first, gl.minimum(segment.end, segment.num_closed)):
        page = gl.load(segment.indices_ptr + index).to(gl.int64)
        rows_ptr = pages_ptr + page * SPEC.page_bytes
        k_ptr = (rows_ptr + SPEC.k.codes).to(row_type)
        v_ptr = (rows_ptr + SPEC.v.codes).to(row_type)
        for chunk in range(0, PAGE, CHUNK):
            masked = SINKS - chunk if index == 0 else 0
            state = _attend_rows(
                k_ptr + chunk * SPEC.head_dim, v_ptr + chunk * SPEC.head_dim, SPEC.head_dim,
                masked, CHUNK, q_rows, sm_scale_log2, state, HEADS, SPEC,
            )  # fmt: skip
    return state


@jit
def attend_tail(
    segment, storage, q_rows, sm_scale_log2, state,
    SINKS: tl.constexpr, HEADS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Add the segment's units of open rows and sink rows."""
    ROW: tl.constexpr = SPEC.num_kv_heads * SPEC.head_dim
    open_ptr = open_page_ptr(segment, storage, SPEC)
    sink_ptr = storage.sink_rows_ptr + segment.sink_page.to(gl.int64) * (SPEC.page_bytes // 2)
    sink_ptr = sink_ptr + segment.head * SPEC.head_dim
    for unit in range(gl.maximum(segment.first, segment.num_closed), segment.end):
        chunk = unit - segment.num_closed
        k_ptr = open_ptr + chunk * (CHUNK * ROW)
        to_v = PAGE * ROW
        rows = segment.last_page_len - chunk * CHUNK
        if chunk >= PAGE // CHUNK:
            k_ptr = sink_ptr
            to_v = SINKS * ROW
            rows = SINKS if (segment.num_closed > 0) & (chunk == PAGE // CHUNK) else 0
        if rows > 0:
            state = _attend_rows(
                k_ptr, k_ptr + to_v, ROW, 0, rows, q_rows, sm_scale_log2, state, HEADS, SPEC
            )
    return state
