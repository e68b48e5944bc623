"""Queries in registers, as right operands of the tensor core."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

from sgl_kvq.kernels.common.gluon import gl, jit
from sgl_kvq.kernels.common.layouts import (
    b_layout,
    code_query_layout,
    key_words,
    mma_layout,
    num_groups,
    num_planes,
    padded_dim,
    plane_scale,
    plane_width,
    query_layout,
)
from sgl_kvq.kernels.decode.extra_bits import extra_queries
from sgl_kvq.kernels.decode.tiles import (
    CODE_UNIT,
    channel_of,
    columns_in_order,
    key_part,
    split_key_channels,
)


class CodeQueries(NamedTuple):
    """The queries of a KV head as key codes meet them.

    Args:
        codes: float16 right operands by group, byte half and plane: q / norm * plane_scale.
        extra: Likewise for the extra bits of outlier channels, by tile and step.
        mins: Factors of the minima, see `_min_queries`.
        unit: [heads], factor from products with codes to scores in base 2.
    """

    codes: Any
    extra: Any
    mins: Any
    unit: Any


@jit
def _power_of_2_above(x):
    """The power of two above x >= 0 (float32)."""
    exponent = (x.to(gl.int32, bitcast=True) & 0x7F800000) + 0x00800000
    return exponent.to(gl.float32, bitcast=True)


@jit
def row_queries(q_ptr, stride_h, HEADS: tl.constexpr, GQA: tl.constexpr, SPEC: tl.constexpr):
    """Queries as the operand [padded_dim, heads] that 16-bit rows meet."""
    DIM: tl.constexpr = padded_dim(SPEC)
    LAYOUT: tl.constexpr = query_layout(DIM, HEADS)
    heads = gl.arange(0, HEADS, gl.SliceLayout(1, LAYOUT))
    channels = gl.arange(0, DIM, gl.SliceLayout(0, LAYOUT))
    mask = (heads < GQA)[:, None] & (channels < SPEC.head_dim)[None, :]
    q = gl.load(q_ptr + heads[:, None] * stride_h + channels[None, :], mask=mask, other=0.0)
    q = gl.permute(columns_in_order(q, HEADS, DIM), [1, 0])
    return gl.convert_layout(q, b_layout(), assert_trivial=True)


@jit
def _code_queries(
    q_ptr, stride_h, inverse_norm, HEADS: tl.constexpr, GQA: tl.constexpr, SPEC: tl.constexpr
):
    """Operands for key codes: float16 q / norm * plane_scale by group, byte half and plane."""
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
        halves = ()
        for half in tl.static_range(2):
            planes = ()
            for plane in tl.static_range(num_planes(SPEC.k)):
                part = key_part(parts, half, plane, SPEC) * plane_scale(SPEC.k, plane)
                part = gl.convert_layout(part.to(gl.float16), b_layout(), assert_trivial=True)
                planes = planes + (part,)
            halves = halves + (planes,)
        operands = operands + (halves,)
    return operands


@jit
def _min_queries(q, sm_scale_log2, SPEC: tl.constexpr):
    """Factors of the minima: bfloat16 parts of q (channel axis) or its group sums (token axis)."""
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


@jit
def code_operands(
    queries, q_rows, sm_scale_log2, HEADS: tl.constexpr, GQA: tl.constexpr, SPEC: tl.constexpr
):
    """Load the operands that key codes meet; `q_rows` holds the unrotated queries."""
    q = q_rows
    if SPEC.k.rotation > 1:
        q = row_queries(queries.codes_ptr, queries.codes_stride, HEADS, GQA, SPEC)
    norm = _power_of_2_above(gl.max(gl.abs(q.to(gl.float32)), axis=0))
    ptr, stride = queries.codes_ptr, queries.codes_stride
    codes = _code_queries(ptr, stride, 1.0 / norm, HEADS, GQA, SPEC)
    extra = extra_queries(ptr, stride, 1.0 / norm, HEADS, GQA, SPEC)
    mins = _min_queries(q, sm_scale_log2, SPEC)
    columns = gl.convert_layout(norm, gl.SliceLayout(0, mma_layout()))
    return CodeQueries(codes, extra, mins, columns * (CODE_UNIT * sm_scale_log2))
