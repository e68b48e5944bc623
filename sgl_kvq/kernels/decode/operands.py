"""What the decode kernel multiplies with: queries; and the running softmax."""

from __future__ import annotations

import triton.language as tl

from sgl_kvq.kernels._gluon import (
    constexpr_function,
    gl,
    jit,
)
from sgl_kvq.kernels._layouts import (
    FINE_PLANES,
    b_layout,
    fine_scale,
    key_words,
    lane_sum_layout,
    mma_layout,
    num_fine_tiles,
    num_groups,
    num_planes,
    padded_dim,
    plane_scale,
    plane_width,
)
from sgl_kvq.kernels._tiles import (
    channel_of,
    key_word_of,
)

# Probabilities are scaled by up to 2^14 to use the range of float16, whose largest number is 65504.
HEADROOM: tl.constexpr = tl.constexpr(14.0)


@jit
def power_of_2_above(x):
    """The power of two above x >= 0 (float32)."""
    exponent = (x.to(gl.int32, bitcast=True) & 0x7F800000) + 0x00800000
    return exponent.to(gl.float32, bitcast=True)


@jit
def _load_q(q_ptr, stride_h, channels, valid, heads, GQA: tl.constexpr):
    """Query channels [k, heads] of a KV head, 0 outside."""
    ptrs = q_ptr + heads[None, :] * stride_h + channels[:, None]
    return gl.load(ptrs, mask=valid[:, None] & (heads < GQA)[None, :], other=0.0)


@jit
def row_queries(q_ptr, stride_h, HEADS: tl.constexpr, GQA: tl.constexpr, SPEC: tl.constexpr):
    """Right operand [padded_dim, heads] for 16-bit rows."""
    channels = channel_of(gl.arange(0, padded_dim(SPEC), gl.SliceLayout(1, b_layout())))
    heads = gl.arange(0, HEADS, gl.SliceLayout(0, b_layout()))
    return _load_q(q_ptr, stride_h, channels, channels < SPEC.head_dim, heads, GQA)


@jit
def code_queries(
    q_ptr, stride_h, inverse_norm, HEADS: tl.constexpr, GQA: tl.constexpr, SPEC: tl.constexpr
):
    """Right operands for key codes by group, byte half, plane: float16 q / norm * plane_scale."""
    WIDTH: tl.constexpr = plane_width(SPEC, SPEC.k)
    k = gl.arange(0, key_words(SPEC), gl.SliceLayout(1, b_layout()))
    heads = gl.arange(0, HEADS, gl.SliceLayout(0, b_layout()))
    operands = ()
    for group in tl.static_range(num_groups(SPEC, SPEC.k)):
        for half in tl.static_range(2):
            for plane in tl.static_range(num_planes(SPEC.k)):
                byte = 2 * key_word_of(k, SPEC) + half
                channel = plane * WIDTH + byte
                valid = byte < WIDTH
                if not SPEC.k.per_channel:
                    valid = valid & (channel // SPEC.k.group_channels == group)
                q = _load_q(q_ptr, stride_h, channel, valid, heads, GQA).to(gl.float32)
                q = q * (inverse_norm[None, :] * plane_scale(SPEC.k, plane))
                operands = operands + (q.to(gl.float16),)
    return operands


@jit
def fine_channel(part: tl.constexpr, plane: tl.constexpr, SPEC: tl.constexpr):
    """Channels, and whether they are boosted, in the columns of a fine operand; see `fine_tile`."""
    k = gl.arange(0, 16, gl.SliceLayout(1, b_layout()))
    byte = part * 16 + 2 * (k % 8) + k // 8
    return plane * SPEC.k.fine_bytes + byte, byte < SPEC.k.fine_bytes


@jit
def fine_queries(
    q_ptr, stride_h, inverse_norm, HEADS: tl.constexpr, GQA: tl.constexpr, SPEC: tl.constexpr
):
    """Right operands for the further bits of boosted key channels, by 16 bytes and plane."""
    heads = gl.arange(0, HEADS, gl.SliceLayout(0, b_layout()))
    operands = ()
    for part in tl.static_range(num_fine_tiles(SPEC.k)):
        for plane in tl.static_range(FINE_PLANES):
            channel, valid = fine_channel(part, plane, SPEC)
            q = _load_q(q_ptr, stride_h, channel, valid, heads, GQA).to(gl.float32)
            q = q * (inverse_norm[None, :] * fine_scale(plane))
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
