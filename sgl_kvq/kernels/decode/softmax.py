"""The running softmax of one program, and the partial result it leaves."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

from sgl_kvq.kernels.common.gluon import constexpr_function, gl, jit
from sgl_kvq.kernels.common.layouts import (
    lane_sum_layout,
    mma_layout,
    num_groups,
    num_planes,
    overlaps,
    plane_width,
    value_rows,
)

# Probabilities are scaled by up to 2^14 to use the range of float16, whose largest number is 65504.
HEADROOM: tl.constexpr = tl.constexpr(14.0)
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)


class SoftmaxState(NamedTuple):
    """Online softmax over the rows added so far, in base 2: p_t = 2^(score_t - m).

    Args:
        m: [heads], the shift.
        lane_sum: [8, heads], sums of p_t that each lane has seen.
        offsets: For each value group [8, heads], such sums of p_t * minimum_t; none unless values
            have one minimum a token.
        acc: For each plane [value_rows, heads], sums of p_t * v_t in units of `value_unit`.
    """

    m: Any
    lane_sum: Any
    offsets: Any
    acc: Any


@constexpr_function
def value_unit(spec, plane):
    """Factor from the accumulator of a plane to V."""
    if spec.v.is_raw or spec.v.per_channel:
        return 1.0
    return 2.0**24 * 2.0 ** (-spec.v.num_bits * plane)


@jit
def empty_softmax(HEADS: tl.constexpr, SPEC: tl.constexpr):
    """The state before any row."""
    m = gl.full([HEADS], LOWEST, gl.float32, gl.SliceLayout(0, mma_layout()))
    lane_sum = gl.zeros([8, HEADS], gl.float32, lane_sum_layout(HEADS))
    offsets = ()
    if not SPEC.v.per_channel and not SPEC.v.is_raw:
        for _ in tl.static_range(num_groups(SPEC, SPEC.v)):
            offsets = offsets + (gl.zeros([8, HEADS], gl.float32, lane_sum_layout(HEADS)),)
    acc = ()
    for _ in tl.static_range(num_planes(SPEC.v)):
        acc = acc + (gl.zeros([value_rows(SPEC), HEADS], gl.float32, mma_layout()),)
    return SoftmaxState(m, lane_sum, offsets, acc)


@jit
def rescale(state, top, HEADS: tl.constexpr):
    """Raise the shift to at least `top` [heads] and bring all sums to it."""
    m = gl.maximum(state.m, top)
    alpha = gl.exp2(state.m - m)
    by_lane = gl.convert_layout(
        alpha, gl.SliceLayout(0, lane_sum_layout(HEADS)), assert_trivial=True
    )[None, :]
    offsets = ()
    for group in tl.static_range(len(state.offsets)):
        offsets = offsets + (state.offsets[group] * by_lane,)
    acc = ()
    for plane in tl.static_range(len(state.acc)):
        acc = acc + (state.acc[plane] * alpha[None, :],)
    return SoftmaxState(m, state.lane_sum * by_lane, offsets, acc)


@jit
def store_partial(
    out_ptr, stat_ptr, slot, state, HEADS: tl.constexpr, GQA: tl.constexpr, SPEC: tl.constexpr
):
    """Write unnormalized output [GQA, head_dim], shift and sum [2, GQA] of a partial result."""
    COLS: tl.constexpr = gl.SliceLayout(0, mma_layout())
    heads = gl.arange(0, HEADS, COLS)
    total = gl.convert_layout(gl.sum(state.lane_sum, axis=0), COLS)
    stat_ptr += slot * (2 * GQA)
    gl.store(stat_ptr + heads, state.m, mask=heads < GQA)
    gl.store(stat_ptr + GQA + heads, total, mask=heads < GQA)
    WIDTH: tl.constexpr = plane_width(SPEC, SPEC.v)
    rows = gl.arange(0, value_rows(SPEC), gl.SliceLayout(1, mma_layout()))
    out_ptr += slot.to(gl.int64) * (GQA * SPEC.head_dim)
    for plane in tl.static_range(num_planes(SPEC.v)):
        out = state.acc[plane] * value_unit(SPEC, plane)
        channels = plane * WIDTH + rows
        for group in tl.static_range(len(state.offsets)):
            if overlaps(SPEC, SPEC.v, plane, group):
                low = gl.convert_layout(gl.sum(state.offsets[group], axis=0), COLS)
                inside = channels // SPEC.v.group_channels == group
                out = out + gl.where(inside[:, None], low[None, :], 0.0)
        ptrs = out_ptr + heads[None, :] * SPEC.head_dim + channels[:, None]
        gl.store(ptrs, out, mask=(rows < WIDTH)[:, None] & (heads < GQA)[None, :])
