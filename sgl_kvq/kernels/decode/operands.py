"""What the decode kernel multiplies with: queries; and the running softmax."""

from __future__ import annotations

import triton.language as tl

from sgl_kvq.kernels.common.gluon import (
    constexpr_function,
    gl,
    jit,
)
from sgl_kvq.kernels.common.layouts import (
    b_layout,
    code_query_layout,
    extra_scale,
    key_words,
    lane_sum_layout,
    mma_layout,
    num_extra_steps,
    num_extra_tiles,
    num_groups,
    num_planes,
    padded_dim,
    plane_scale,
    plane_width,
    query_layout,
)
from sgl_kvq.kernels.common.tiles import (
    channel_of,
    columns_in_order,
    extra_place,
    key_part,
    split_key_channels,
)

# Probabilities are scaled by up to 2^14 to use the range of float16, whose largest number is 65504.
HEADROOM: tl.constexpr = tl.constexpr(14.0)


@jit
def power_of_2_above(x):
    """The power of two above x >= 0 (float32)."""
    exponent = (x.to(gl.int32, bitcast=True) & 0x7F800000) + 0x00800000
    return exponent.to(gl.float32, bitcast=True)


@jit
def row_queries(q_ptr, stride_h, HEADS: tl.constexpr, GQA: tl.constexpr, SPEC: tl.constexpr):
    """Right operand [padded_dim, heads] for 16-bit rows."""
    DIM: tl.constexpr = padded_dim(SPEC)
    LAYOUT: tl.constexpr = query_layout(DIM, HEADS)
    heads = gl.arange(0, HEADS, gl.SliceLayout(1, LAYOUT))
    channels = gl.arange(0, DIM, gl.SliceLayout(0, LAYOUT))
    mask = (heads < GQA)[:, None] & (channels < SPEC.head_dim)[None, :]
    q = gl.load(q_ptr + heads[:, None] * stride_h + channels[None, :], mask=mask, other=0.0)
    q = gl.permute(columns_in_order(q, HEADS, DIM), [1, 0])
    return gl.convert_layout(q, b_layout(), assert_trivial=True)


@jit
def code_queries(
    q_ptr, stride_h, inverse_norm, HEADS: tl.constexpr, GQA: tl.constexpr, SPEC: tl.constexpr
):
    """Right operands for key codes by group, byte half, plane: float16 q / norm * plane_scale."""
    WIDTH: tl.constexpr = plane_width(SPEC, SPEC.k)
    BYTES: tl.constexpr = 2 * key_words(SPEC)
    LAYOUT: tl.constexpr = code_query_layout(SPEC, HEADS)
    heads = gl.arange(0, HEADS, gl.SliceLayout(1, LAYOUT))
    place = gl.arange(0, num_planes(SPEC.k) * BYTES, gl.SliceLayout(0, LAYOUT))
    if WIDTH == BYTES:
        channels = place
    else:
        channels = place // BYTES * WIDTH + place % BYTES
    mask = (heads < GQA)[:, None] & (place % BYTES < WIDTH)[None, :]
    q = gl.load(q_ptr + heads[:, None] * stride_h + channels[None, :], mask=mask, other=0.0)
    factor = gl.convert_layout(inverse_norm, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    q = q.to(gl.float32) * factor[:, None]
    operands = ()
    for group in tl.static_range(num_groups(SPEC, SPEC.k)):
        own = q
        if not SPEC.k.per_channel:
            own = gl.where((channels // SPEC.k.group_channels == group)[None, :], q, 0.0)
        parts = split_key_channels(own, HEADS, SPEC)
        for half in tl.static_range(2):
            for plane in tl.static_range(num_planes(SPEC.k)):
                part = key_part(parts, half, plane, SPEC) * plane_scale(SPEC.k, plane)
                part = gl.convert_layout(part.to(gl.float16), b_layout(), assert_trivial=True)
                operands = operands + (part,)
    return operands


@jit
def extra_queries(
    q_ptr, stride_h, inverse_norm, HEADS: tl.constexpr, GQA: tl.constexpr, SPEC: tl.constexpr
):
    """Right operands for the extra bits of outlier key channels, by tile and step."""
    heads = gl.arange(0, HEADS, gl.SliceLayout(0, b_layout()))
    k = gl.arange(0, 16, gl.SliceLayout(1, b_layout()))
    operands = ()
    for part in tl.static_range(num_extra_tiles(SPEC.k)):
        for step in tl.static_range(num_extra_steps(SPEC.k)):
            channel, valid = extra_place(2 * (k % 8) + k // 8, part, step, SPEC)
            ptrs = q_ptr + heads[None, :] * stride_h + channel[:, None]
            mask = valid[:, None] & (heads < GQA)[None, :]
            q = gl.load(ptrs, mask=mask, other=0.0).to(gl.float32)
            q = q * (inverse_norm[None, :] * extra_scale(step))
            operands = operands + (q.to(gl.float16),)
    return operands


@jit
def min_queries(q, sm_scale_log2, SPEC: tl.constexpr):
    """What minima are multiplied with: bfloat16 parts of q (channel axis) or its group sums."""
    if SPEC.k.per_channel:
        high = q.to(gl.bfloat16)
        if q.dtype == gl.bfloat16:
            return (high,)
        else:
            return (high, (q.to(gl.float32) - high.to(gl.float32)).to(gl.bfloat16))
    else:
        channels = channel_of(gl.arange(0, padded_dim(SPEC), gl.SliceLayout(1, b_layout())))
        sums = ()
        for group in tl.static_range(num_groups(SPEC, SPEC.k)):
            inside = (channels // SPEC.k.group_channels == group)[:, None]
            total = gl.sum(gl.where(inside, q.to(gl.float32), 0.0), axis=0) * sm_scale_log2
            sums = sums + (gl.convert_layout(total, gl.SliceLayout(0, mma_layout())),)
        return sums


@constexpr_function
def value_unit(spec, plane):
    """What the accumulator of a plane must be multiplied with to be in units of V."""
    if spec.v.is_raw or spec.v.per_channel:
        return 1.0
    return 2.0**24 * 2.0 ** (-spec.v.num_bits * plane)


@jit
def rescale(top, m_run, lane_sum, offsets, HEADS: tl.constexpr):
    """Raise the running shift to `top`; rescale the sums kept by lane."""
    m_new = gl.maximum(m_run, top)
    alpha = gl.exp2(m_run - m_new)
    by_lane = gl.convert_layout(
        alpha, gl.SliceLayout(0, lane_sum_layout(HEADS)), assert_trivial=True
    )[None, :]
    scaled = ()
    for group in tl.static_range(len(offsets)):
        scaled = scaled + (offsets[group] * by_lane,)
    return m_new, alpha, lane_sum * by_lane, scaled
