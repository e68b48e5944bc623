"""Attention to 16-bit rows: the open page, sink tokens, pages that were never quantized."""

from __future__ import annotations

import triton.language as tl

from sgl_kvq.kernels.common.gluon import (
    INTERPRET,
    gl,
    jit,
    mma_v2,
)
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
from sgl_kvq.kernels.common.tiles import (
    columns_in_order,
    sum_in_lane,
    transpose_blocks,
)
from sgl_kvq.kernels.decode.operands import (
    HEADROOM,
    rescale,
    value_unit,
)


@jit
def prefetch_rows(rows_ptr, num_rows, SPEC: tl.constexpr):
    """Start fetching one head's K and V rows of an open page into the L2 cache."""
    if not INTERPRET:
        ROW: tl.constexpr = SPEC.num_kv_heads * SPEC.head_dim
        LINES: tl.constexpr = next_power_of_2((2 * SPEC.head_dim + 127) // 128)
        LAYOUT: tl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        line = gl.arange(0, 2 * PAGE * LINES, LAYOUT)
        row = gl.minimum(line // LINES % PAGE, num_rows - 1)
        channel = gl.minimum(line % LINES * 64, SPEC.head_dim - 1)
        ptrs = rows_ptr + (line // (LINES * PAGE) * PAGE + row) * ROW + channel
        gl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [ptrs.to(gl.int64)],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )


@jit
def load_fresh_row(k_ptr, v_ptr, wanted, SPEC: tl.constexpr):
    """One head's newest row, K and V [padded_dim] each, if it is wanted."""
    channels = gl.arange(0, padded_dim(SPEC), gl.BlockedLayout([4], [32], [1], [0]))
    mask = (channels < SPEC.head_dim) & wanted
    return gl.load(k_ptr + channels, mask=mask), gl.load(v_ptr + channels, mask=mask)


@jit
def store_fresh_row(row_ptr, k, v, wanted, SPEC: tl.constexpr):
    """Put what `load_fresh_row` returned into the open slot, where K's row begins at row_ptr."""
    channels = gl.arange(0, padded_dim(SPEC), gl.BlockedLayout([4], [32], [1], [0]))
    mask = (channels < SPEC.head_dim) & wanted
    gl.store(row_ptr + channels, k, mask=mask)
    gl.store(row_ptr + PAGE * SPEC.num_kv_heads * SPEC.head_dim + channels, v, mask=mask)


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
def attend_rows(
    k_ptr, v_ptr, stride, first, end, q_rows, sm_scale_log2, m_run, lane_sum, offsets, acc,
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
    m = gl.arange(0, 16, gl.SliceLayout(1, mma_layout()))
    s = gl.where(((m >= first) & (m < end))[:, None], s, float("-inf"))
    m_run, alpha, lane_sum, offsets = rescale(
        gl.max(s, axis=0) - HEADROOM, m_run, lane_sum, offsets, HEADS
    )
    p = gl.exp2(s - m_run[None, :])
    lane_sum = lane_sum + sum_in_lane(p, 16, HEADS)
    p = transpose_blocks(p.to(k_ptr.dtype.element_ty), 16, HEADS)
    p = gl.permute(gl.reshape(p, [2, 8, HEADS // 8, 8]), [0, 3, 2, 1])
    p = gl.convert_layout(gl.reshape(p, [16, HEADS]), b_layout(), assert_trivial=True)
    added = ()
    for plane in tl.static_range(num_planes(SPEC.v)):
        product = gl.zeros([value_rows(SPEC), HEADS], gl.float32, mma_layout())
        product = mma_v2(values[plane], p, product) * (1.0 / value_unit(SPEC, plane))
        added = added + (acc[plane] * alpha[None, :] + product,)
    return m_run, lane_sum, offsets, added
