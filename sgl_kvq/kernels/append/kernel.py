"""Append kernel: fresh rows to staging, full pages to codes, in one launch (Triton).

One program for each page that gets rows, KV head, and K or V. The arithmetic is that of
`reference.py`, operation by operation, so that codes and metadata agree to the bit: divisions are
IEEE divisions and the kernel must be launched without fused multiply-adds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sgl_kvq.kernels._layouts import (
    FINE_BITS,
    FINE_PLANES,
    FINE_STEPS,
    PAGE,
    cut_share,
    next_power_of_2,
    num_boosted,
    num_cuts,
    num_groups,
    num_planes,
    plane_width,
)
from sgl_kvq.kernels._rotation import rotate_tile
from sgl_kvq.kernels.append.reference import LARGEST_MAGNITUDE

LARGEST: tl.constexpr = tl.constexpr(LARGEST_MAGNITUDE)
# Index tensors, whose address must not make Triton compile another variant.
TOUCHED = (
    *("page_ptr", "slot_ptr", "sink_slot_ptr", "prior_ptr", "first_ptr", "end_ptr", "start_ptr"),
    "is_first_ptr",
)
_ROUND: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to nearest even


@triton.jit
def _round_to_bf16(x):
    """Finite float32 rounded to bfloat16, nearest even, as float32.

    Spelled out because Triton's interpreter truncates.
    """
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _range(low, high, top):
    """Scales and minima as float32: m = bf16(low), s = bf16((high - m) / top)."""
    mins = _round_to_bf16(low)
    scales = _round_to_bf16(tl.math.div_rn(high - mins, low * 0.0 + top))
    return tl.where(scales > 0.0, scales, 1.0), mins


@triton.jit
def _codes(x, scales, mins, top, HALF_UP: tl.constexpr):
    """Codes 0 to top (float32) of x against stored scales and minima, all broadcastable to x."""
    divisor, steps = tl.broadcast(scales, x - mins)
    steps = tl.math.div_rn(steps, divisor)
    # Far outside of the range of codes the rounding trick would not round.
    steps = tl.minimum(tl.maximum(steps, -1.0), top + 1.0)
    if HALF_UP:
        steps = tl.floor(steps + 0.5)
    else:
        steps = (steps + _ROUND) - _ROUND
    return tl.minimum(tl.maximum(steps, 0.0), top)


@triton.jit
def _error(x, scales, mins, top, counts, AXIS: tl.constexpr, HALF_UP: tl.constexpr):
    """Sum of squared errors of each group, of the elements that count."""
    scales, mins = tl.expand_dims(scales, AXIS), tl.expand_dims(mins, AXIS)
    error = _codes(x, scales, mins, top, HALF_UP) * scales + mins - x
    return tl.sum(tl.where(counts, error * error, 0.0), axis=AXIS)


@triton.jit
def _fit(x, counts, tops, top, AXIS: tl.constexpr, CODING: tl.constexpr):
    """Scales and minima of the groups along AXIS, over the elements that count.

    `tops` is the largest code by group, `top` the same broadcastable to x.
    """
    low = tl.min(tl.where(counts, x, float("inf")), axis=AXIS)
    high = tl.max(tl.where(counts, x, float("-inf")), axis=AXIS)
    scales, mins = _range(low, high, tops)
    if num_cuts(CODING) > 0:
        least = _error(x, scales, mins, top, counts, AXIS, CODING.half_up)
        for i in tl.static_range(num_cuts(CODING)):
            cut = (high - low) * cut_share(CODING, i)
            tried_scales, tried_mins = _range(low + cut, high - cut, tops)
            error = _error(x, tried_scales, tried_mins, top, counts, AXIS, CODING.half_up)
            better = error < least
            least = tl.where(better, error, least)
            scales = tl.where(better, tried_scales, scales)
            mins = tl.where(better, tried_mins, mins)
    return scales, mins


@triton.jit
def _close(
    x, channel, valid, num_sinks, head_ptr,
    CODING: tl.constexpr, IS_KEY: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Quantize 64 finite rows [64, positions] (float32) and write all fields of K or of V."""
    PLANES: tl.constexpr = num_planes(CODING)
    WIDTH: tl.constexpr = plane_width(SPEC, CODING)
    PADDED: tl.constexpr = next_power_of_2(WIDTH)
    MAX_CODE: tl.constexpr = (1 << CODING.num_bits) - 1
    if CODING.rotation > 1:
        x = rotate_tile(x, channel, CODING.rotation, WIDTH, PADDED)
    tokens = tl.arange(0, PAGE)
    is_sink = tokens < num_sinks
    meta_ptr = head_ptr.to(tl.pointer_type(tl.bfloat16))
    if CODING.per_channel:
        counts, _ = tl.broadcast((is_sink == 0)[:, None], x)
        is_boosted = channel < num_boosted(CODING)
        tops = tl.where(is_boosted, (MAX_CODE + 1) * FINE_STEPS - 1.0, MAX_CODE + 0.0)
        scales, mins = _fit(x, counts, tops, tops[None, :], 0, CODING)  # [positions]
        codes = _codes(x, scales[None, :], mins[None, :], tops[None, :], CODING.half_up)
        scales = tl.where(is_boosted, scales * FINE_STEPS, scales)
        tl.store(meta_ptr + CODING.scales // 2 + channel, scales.to(tl.bfloat16), mask=valid)
        tl.store(meta_ptr + CODING.mins // 2 + channel, mins.to(tl.bfloat16), mask=valid)
    else:
        element_scales = tl.full(x.shape, 1.0, tl.float32)
        element_mins = tl.zeros(x.shape, tl.float32)
        for group in tl.static_range(num_groups(SPEC, CODING)):
            inside = (valid & (channel // CODING.group_channels == group))[None, :]
            counts, _ = tl.broadcast(inside, x)
            scales, mins = _fit(x, counts, MAX_CODE + 0.0, MAX_CODE + 0.0, 1, CODING)  # [64]
            tl.store(meta_ptr + CODING.scales // 2 + group * PAGE + tokens, scales.to(tl.bfloat16))
            tl.store(meta_ptr + CODING.mins // 2 + group * PAGE + tokens, mins.to(tl.bfloat16))
            element_scales = tl.where(inside, scales[:, None], element_scales)
            element_mins = tl.where(inside, mins[:, None], element_mins)
        codes = _codes(x, element_scales, element_mins, MAX_CODE + 0.0, CODING.half_up)
    codes = tl.where(is_sink[:, None] | (valid == 0)[None, :], 0.0, codes).to(tl.int32)
    if CODING.fine_bytes > 0:
        _store_fine(codes, tokens, head_ptr + CODING.fine, CODING, WIDTH, PADDED)
        codes = tl.where((channel < num_boosted(CODING))[None, :], codes >> FINE_BITS, codes)

    byte = tl.arange(0, PADDED)
    plane = tl.arange(0, PLANES)
    fields = tl.reshape(codes, [PAGE, PLANES, PADDED]) << (CODING.num_bits * plane)[None, :, None]
    packed = tl.sum(fields, axis=1).to(tl.uint8)  # [64, PADDED]
    if IS_KEY:
        ptrs = head_ptr + CODING.codes + tokens[:, None] * WIDTH + byte[None, :]
    else:
        ptrs = head_ptr + CODING.codes + byte[None, :] * PAGE + tokens[:, None]
    tl.store(ptrs, packed, mask=(byte < WIDTH)[None, :])
    if CODING.sums > 0:
        _store_sums(codes, channel, valid, tokens, head_ptr + CODING.sums, CODING, IS_KEY, SPEC)


@triton.jit
def _store_fine(
    codes, tokens, fine_ptr, CODING: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    """Write the lowest bits of the boosted channels, [64, fine_bytes]."""
    BYTES: tl.constexpr = next_power_of_2(CODING.fine_bytes)
    place = tl.arange(0, FINE_PLANES * BYTES)
    channel = (place // BYTES) * CODING.fine_bytes + place % BYTES
    position = ((channel // WIDTH) * PADDED + channel % WIDTH) % codes.shape[1]
    index, _ = tl.broadcast(position[None, :], tl.zeros([PAGE, FINE_PLANES * BYTES], tl.int32))
    fine = tl.gather(codes & (FINE_STEPS - 1), index, axis=1)
    shift = tl.arange(0, FINE_PLANES) * FINE_BITS
    packed = tl.sum(tl.reshape(fine, [PAGE, FINE_PLANES, BYTES]) << shift[None, :, None], axis=1)
    byte = tl.arange(0, BYTES)
    ptrs = fine_ptr + tokens[:, None] * CODING.fine_bytes + byte[None, :]
    tl.store(ptrs, packed.to(tl.uint8), mask=(byte < CODING.fine_bytes)[None, :])


@triton.jit
def _store_sums(
    codes, channel, valid, tokens, sums_ptr,
    CODING: tl.constexpr, IS_KEY: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Write code sums: by token and partition (K) or by channel (V)."""
    if not CODING.sums_are_bytes:
        sums_ptr = sums_ptr.to(tl.pointer_type(tl.int16))
    if IS_KEY:
        for part in tl.static_range(SPEC.head_dim // SPEC.partition):
            inside = (channel // SPEC.partition == part)[None, :]
            total = tl.sum(tl.where(inside, codes, 0), axis=1)
            tl.store(sums_ptr + part * PAGE + tokens, total.to(sums_ptr.dtype.element_ty))
    else:
        total = tl.sum(codes, axis=0)
        tl.store(sums_ptr + channel, total.to(sums_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _append_tensor(
    fresh_ptr, stride_t, stride_h, which: tl.constexpr, head, page, slot, sink_slot, prior,
    first, end, start, is_first_page,
    pages_ptr, open_rows_ptr, prior_rows_ptr, sink_rows_ptr, num_contained_ptr,
    SINKS: tl.constexpr, KEEP: tl.constexpr, CODING: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """One page's fresh rows first to end - 1 of K (which = 0) or V (which = 1) of one head."""
    D: tl.constexpr = SPEC.head_dim
    ROW: tl.constexpr = SPEC.num_kv_heads * D
    PLANES: tl.constexpr = num_planes(CODING)
    WIDTH: tl.constexpr = plane_width(SPEC, CODING)
    PADDED: tl.constexpr = next_power_of_2(WIDTH)
    position = tl.arange(0, PLANES * PADDED)
    channel = (position // PADDED) * WIDTH + position % PADDED
    valid = position % PADDED < WIDTH
    tokens = tl.arange(0, PAGE)
    is_fresh = (tokens >= first) & (tokens < end)
    rows = tokens.to(tl.int64)[:, None]
    fresh = fresh_ptr + (start - first + rows) * stride_t + head * stride_h + channel[None, :]
    x = tl.load(fresh, mask=is_fresh[:, None] & valid[None, :], other=0.0)
    in_slot = which * PAGE * ROW + rows * ROW + head * D + channel[None, :]
    closes = end == PAGE
    if KEEP or not closes:
        ptrs = open_rows_ptr + slot.to(tl.int64) * (2 * PAGE * ROW) + in_slot
        tl.store(ptrs, x, mask=is_fresh[:, None] & valid[None, :])
    if closes:
        ptrs = prior_rows_ptr + prior.to(tl.int64) * (2 * PAGE * ROW) + in_slot
        earlier = tl.load(ptrs, mask=(tokens < first)[:, None] & valid[None, :], other=0.0)
        x = tl.where((tokens < first)[:, None], earlier, x)
        wide = x.to(tl.float32)
        contained = tl.where(wide == wide, tl.minimum(tl.maximum(wide, -LARGEST), LARGEST), 0.0)
        count = tl.sum(tl.sum((contained != wide).to(tl.int32), axis=1), axis=0)
        if count > 0:
            tl.atomic_add(num_contained_ptr, count.to(tl.int64))
        num_sinks = tl.where(is_first_page, SINKS, 0)
        if SINKS > 0 and is_first_page:
            at = sink_slot.to(tl.int64) * (2 * SINKS * ROW) + which * SINKS * ROW
            ptrs = sink_rows_ptr + at + rows * ROW + head * D + channel[None, :]
            mask = (tokens < SINKS)[:, None] & valid[None, :]
            tl.store(ptrs, contained.to(x.dtype), mask=mask)
        head_ptr = pages_ptr + page.to(tl.int64) * SPEC.page_bytes + head * SPEC.head_bytes
        if CODING.num_bits == 16:
            ptrs = (head_ptr + CODING.codes).to(tl.pointer_type(x.dtype))
            ptrs = ptrs + tokens[:, None] * D + channel[None, :]
            tl.store(ptrs, contained.to(x.dtype), mask=valid[None, :])
        else:
            _close(
                contained, channel, valid, num_sinks, head_ptr,
                CODING, which == 0, SPEC,
            )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=TOUCHED)
def _append_fwd_kernel(
    k_ptr, v_ptr, stride_kt, stride_kh, stride_vt, stride_vh,
    page_ptr, slot_ptr, sink_slot_ptr, prior_ptr, first_ptr, end_ptr, start_ptr, is_first_ptr,
    pages_ptr, open_rows_ptr, prior_rows_ptr, sink_rows_ptr, num_contained_ptr,
    SINKS: tl.constexpr, KEEP: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """code = clip(round((x - m) / s)) for the pages that fill; rows to staging for the others."""
    touched = tl.program_id(0)
    head = tl.program_id(1)
    page = tl.load(page_ptr + touched)
    slot = tl.load(slot_ptr + touched)
    sink_slot = tl.load(sink_slot_ptr + touched)
    prior = tl.load(prior_ptr + touched)
    first = tl.load(first_ptr + touched)
    end = tl.load(end_ptr + touched)
    start = tl.load(start_ptr + touched)
    is_first_page = tl.load(is_first_ptr + touched) != 0
    K: tl.constexpr = SPEC.k
    V: tl.constexpr = SPEC.v
    if tl.program_id(2) == 0:
        _append_tensor(
            k_ptr, stride_kt, stride_kh, 0, head, page, slot, sink_slot, prior,
            first, end, start, is_first_page,
            pages_ptr, open_rows_ptr, prior_rows_ptr, sink_rows_ptr, num_contained_ptr,
            SINKS, KEEP, K, SPEC,
        )  # fmt: skip
    else:
        _append_tensor(
            v_ptr, stride_vt, stride_vh, 1, head, page, slot, sink_slot, prior,
            first, end, start, is_first_page,
            pages_ptr, open_rows_ptr, prior_rows_ptr, sink_rows_ptr, num_contained_ptr,
            SINKS, KEEP, V, SPEC,
        )  # fmt: skip
