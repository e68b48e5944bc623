"""Quantizing 64 rows of one head: the device functions of the append and close kernels (Triton).

The arithmetic is that of `formats/quantize.py`, rounding by rounding: codes and metadata agree to
the bit. Kernels must be launched without fused multiply-adds; the two that are meant are spelled
out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sgl_kvq.formats.quantize import NESTED_CONSTANT_SCALE
from sgl_kvq.kernels.common.gluon import INTERPRET
from sgl_kvq.kernels.common.layouts import (
    EXTRA_BITS,
    EXTRA_PLANES,
    EXTRA_STEPS,
    PAGE,
    next_power_of_2,
    num_groups,
    num_outliers,
    num_planes,
    plane_width,
)
from sgl_kvq.kernels.common.rotation import rotate_tile

_ROUND: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to nearest even
CONSTANT_SCALE: tl.constexpr = tl.constexpr(NESTED_CONSTANT_SCALE)
_SMALL_SCALE: tl.constexpr = tl.constexpr(2.0**-60)
_LIFT: tl.constexpr = tl.constexpr(2.0**64)


@triton.jit
def _round_to_bf16(x):
    """Finite float32 rounded to bfloat16, nearest even, as float32.

    Spelled out because Triton's interpreter truncates.
    """
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def divisors(scales, mins):
    """Per-group constants for `quotient`: (lift, shifted minimum, divisor, reciprocal).

    Tiny scales are lifted by a power of two, x and minimum alike: 1 / scale would overflow.
    """
    lift = tl.where(scales < _SMALL_SCALE, _LIFT, 1.0)
    divisor = scales * lift
    return lift, -mins * lift, divisor, tl.math.div_rn(divisor * 0.0 + 1.0, divisor)


@triton.jit
def quotient(x, lift, shifted_min, divisor, reciprocal):
    """(x - m) / s correctly rounded, wherever it is between 2^-20 and 2^20 in size.

    With y = (x - m) * reciprocal, a few ulp off, r = (x - m) - y s is exact, since s has 8
    significant bits, and y + r * reciprocal errs by at most 2^-20 ulp before it is rounded. The
    exact quotient is never that close to the middle of two floats: a bfloat16 divisor keeps it
    2^-9 ulp away, and in the middle it would have more bits than x - m has.
    """
    if INTERPRET:  # has no fused multiply-add
        difference, divisor = tl.broadcast(x * lift + shifted_min, divisor)
        return tl.math.div_rn(difference, divisor)
    else:
        difference = tl.fma(x, lift, shifted_min)
        y = difference * reciprocal
        return tl.fma(tl.fma(-y, divisor, difference), reciprocal, y)


@triton.jit
def _kept(x, counts, other):
    """Put `other` in place of the elements of x that do not count."""
    if counts is None:
        return x
    else:
        return tl.where(counts, x, other)


@triton.jit
def _fit(x, counts, margin, top, AXIS: tl.constexpr):
    """Scales and minima of the groups along AXIS (float32), over the elements that count.

    m = bf16(low), s = bf16((high - m) / top); low and high lie the share `margin` of the range
    inside it (None: at its ends). `margin` and `top` are by group, or one for all.
    """
    low = tl.min(_kept(x, counts, float("inf")), axis=AXIS)
    high = tl.max(_kept(x, counts, float("-inf")), axis=AXIS)
    constant = low * 0.0 + 1.0
    if margin is not None:
        inwards = (high - low) * margin
        low, high = low + inwards, high - inwards
        constant = tl.where(margin > 0.0, constant * CONSTANT_SCALE, constant)
    mins = _round_to_bf16(low)
    scales = _round_to_bf16(tl.math.div_rn(high - mins, low * 0.0 + top))
    return tl.where(scales > 0.0, scales, constant), mins


@triton.jit
def _codes(
    x, scales, mins, steps, offset, top, AXIS: tl.constexpr, HALF_UP: tl.constexpr
):  # fmt: skip
    """Codes clip(round((x - m) / s * steps + offset), 0, top) of groups along AXIS, as float32.

    The last three are broadcastable to x; None for 1 step and no offset.
    """
    lift, shifted_min, divisor, reciprocal = divisors(scales, mins)
    codes = quotient(
        x,
        tl.expand_dims(lift, AXIS),
        tl.expand_dims(shifted_min, AXIS),
        tl.expand_dims(divisor, AXIS),
        tl.expand_dims(reciprocal, AXIS),
    )
    if steps is not None:
        codes = codes * steps
    if offset is not None:
        codes = codes + offset
    codes = tl.minimum(tl.maximum(codes, 0.0), top)
    return tl.floor(codes + 0.5) if HALF_UP else (codes + _ROUND) - _ROUND


@triton.jit
def _to_int(codes):
    """Codes as int32, from the bits of a sum: conversions take four times as long."""
    return (codes + _ROUND).to(tl.int32, bitcast=True) & 0x3FF


@triton.jit
def quantize_rows(
    x, channel, valid, num_sinks, head_ptr,
    CODING: tl.constexpr, IS_KEY: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Quantize 64 finite rows [64, positions] (float32) and write all fields of K or of V.

    Position (c // WIDTH) * PADDED + c % WIDTH holds channel c; `valid` marks positions that do.
    """
    PLANES: tl.constexpr = num_planes(CODING)
    WIDTH: tl.constexpr = plane_width(SPEC, CODING)
    PADDED: tl.constexpr = next_power_of_2(WIDTH)
    if CODING.rotation > 1:
        x = rotate_tile(x, channel, CODING.rotation, WIDTH, PADDED)
    tokens = tl.arange(0, PAGE)
    is_sink = tokens < num_sinks
    meta_ptr = head_ptr.to(tl.pointer_type(tl.bfloat16))
    if CODING.per_channel:
        codes = _code_channels(x, channel, valid, is_sink, meta_ptr, CODING)
    else:
        codes = _code_tokens(x, channel, valid, tokens, meta_ptr, CODING, WIDTH == PADDED, SPEC)
    codes = _to_int(tl.where(is_sink[:, None] | (valid == 0)[None, :], 0.0, codes))
    if CODING.extra_bytes > 0:
        _store_extra(codes, tokens, head_ptr + CODING.extra, CODING, WIDTH, PADDED)
    if CODING.nested:
        codes = codes >> EXTRA_BITS
    elif CODING.extra_bytes > 0:
        codes = tl.where((channel < num_outliers(CODING))[None, :], codes >> EXTRA_BITS, codes)

    byte = tl.arange(0, PADDED)
    plane = tl.arange(0, PLANES)
    fields = tl.reshape(codes, [PAGE, PLANES, PADDED]) << (CODING.num_bits * plane)[None, :, None]
    packed = tl.sum(fields, axis=1).to(tl.uint8)  # [64, PADDED]
    if IS_KEY:
        ptrs = head_ptr + CODING.codes + tokens[:, None] * WIDTH + byte[None, :]
    else:
        ptrs = head_ptr + CODING.codes + byte[None, :] * PAGE + tokens[:, None]
    tl.store(ptrs, packed, mask=(byte < WIDTH)[None, :])


@triton.jit
def _code_channels(x, channel, valid, is_sink, meta_ptr, CODING: tl.constexpr):
    """Codes of rows with one scale a channel."""
    CELLS: tl.constexpr = 1 << CODING.num_bits
    counts, _ = tl.broadcast((is_sink == 0)[:, None], x)
    is_outlier = channel < num_outliers(CODING)
    tops = tl.where(is_outlier, CELLS * EXTRA_STEPS - 1.0, CELLS - 1.0)
    margin, steps, offset, top = None, None, None, tops[None, :]
    if CODING.nested:
        margin = tl.where(is_outlier, 0.0, CODING.margin)
        steps, top = EXTRA_STEPS, CELLS * EXTRA_STEPS - 1.0
        offset = tl.where(is_outlier, 0.0, (EXTRA_STEPS - 1) / 2)[None, :]
    elif CODING.extra_bytes > 0:
        steps = tl.where(is_outlier, EXTRA_STEPS, 1)[None, :]
    scales, mins = _fit(x, counts, margin, tops, 0)  # [positions]
    if CODING.extra_bytes > 0:
        scales = tl.where(is_outlier, scales * EXTRA_STEPS, scales)
    tl.store(meta_ptr + CODING.scales // 2 + channel, scales.to(tl.bfloat16), mask=valid)
    tl.store(meta_ptr + CODING.mins // 2 + channel, mins.to(tl.bfloat16), mask=valid)
    return _codes(x, scales, mins, steps, offset, top, 0, CODING.half_up)


@triton.jit
def _code_tokens(
    x, channel, valid, tokens, meta_ptr,
    CODING: tl.constexpr, IN_ORDER: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Codes of rows with one scale a token and group of channels.

    IN_ORDER says that positions are channels, so that groups are pieces of equal size.
    """
    CELLS: tl.constexpr = 1 << CODING.num_bits
    GROUPS: tl.constexpr = num_groups(SPEC, CODING)
    margin, steps, offset, top = None, None, None, CELLS - 1.0
    if CODING.nested:
        margin, steps = CODING.margin, EXTRA_STEPS
        offset, top = (EXTRA_STEPS - 1) / 2, CELLS * EXTRA_STEPS - 1.0
    at = meta_ptr + tokens
    if IN_ORDER:
        grouped = tl.reshape(x, [PAGE, GROUPS, CODING.group_channels])
        scales, mins = _fit(grouped, None, margin, CELLS - 1.0, 2)  # [64, groups]
        group = tl.arange(0, GROUPS)[None, :] * PAGE
        tl.store(at[:, None] + CODING.scales // 2 + group, scales.to(tl.bfloat16))
        tl.store(at[:, None] + CODING.mins // 2 + group, mins.to(tl.bfloat16))
        codes = _codes(grouped, scales, mins, steps, offset, top, 2, CODING.half_up)
        codes = tl.reshape(codes, x.shape)
    else:
        codes = tl.zeros(x.shape, tl.float32)
        for group in tl.static_range(GROUPS):
            inside = (valid & (channel // CODING.group_channels == group))[None, :]
            counts, _ = tl.broadcast(inside, x)
            scales, mins = _fit(x, counts, margin, CELLS - 1.0, 1)  # [64]
            tl.store(at + CODING.scales // 2 + group * PAGE, scales.to(tl.bfloat16))
            tl.store(at + CODING.mins // 2 + group * PAGE, mins.to(tl.bfloat16))
            own = _codes(x, scales, mins, steps, offset, top, 1, CODING.half_up)
            codes = tl.where(inside, own, codes)
    return codes


@triton.jit
def _store_extra(
    codes, tokens, extra_ptr, CODING: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    """Write the lowest bits of the outlier channels, [64, extra_bytes]."""
    BYTES: tl.constexpr = next_power_of_2(CODING.extra_bytes)
    place = tl.arange(0, EXTRA_PLANES * BYTES)
    channel = (place // BYTES) * CODING.extra_bytes + place % BYTES
    position = ((channel // WIDTH) * PADDED + channel % WIDTH) % codes.shape[1]
    index, _ = tl.broadcast(position[None, :], tl.zeros([PAGE, EXTRA_PLANES * BYTES], tl.int32))
    extra = tl.gather(codes & (EXTRA_STEPS - 1), index, axis=1)
    shift = tl.arange(0, EXTRA_PLANES) * EXTRA_BITS
    packed = tl.sum(tl.reshape(extra, [PAGE, EXTRA_PLANES, BYTES]) << shift[None, :, None], axis=1)
    byte = tl.arange(0, BYTES)
    ptrs = extra_ptr + tokens[:, None] * CODING.extra_bytes + byte[None, :]
    tl.store(ptrs, packed.to(tl.uint8), mask=(byte < CODING.extra_bytes)[None, :])
