"""Write closed and touched pages to the scratch buffer of extend attention, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from sgl_kvq.formats.quantize import LARGEST_MAGNITUDE
from sgl_kvq.kernels.common.layouts import (
    EXTRA_BITS,
    EXTRA_STEPS,
    PAGE,
    next_power_of_2,
    num_outliers,
    num_planes,
    plane_width,
)
from sgl_kvq.kernels.common.rotation import rotate_tile
from sgl_kvq.kernels.extend.pages import is_packed, page_planes

LARGEST: tl.constexpr = tl.constexpr(LARGEST_MAGNITUDE)
# Arguments whose address must not make Triton compile another variant.
FILLS = ("page_ptr", "sink_slot_ptr", "touched_ptr", "target_ptr")
TOUCHED = ("prior_ptr", "first_ptr", "end_ptr", "start_ptr")


@triton.jit
def _dequantize(
    head_ptr, tokens, position, channel, valid,
    CODING: tl.constexpr, IS_KEY: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """code * scale + min of one head, float32 [64, positions], back in the unrotated basis."""
    PLANES: tl.constexpr = num_planes(CODING)
    WIDTH: tl.constexpr = plane_width(SPEC, CODING)
    PADDED: tl.constexpr = next_power_of_2(WIDTH)
    byte = position % PADDED
    if IS_KEY:
        ptrs = head_ptr + CODING.codes + tokens[:, None] * WIDTH + byte[None, :]
    else:
        ptrs = head_ptr + CODING.codes + byte[None, :] * PAGE + tokens[:, None]
    packed = tl.load(ptrs, mask=valid[None, :], other=0).to(tl.int32)
    shift = (position // PADDED) * (8 // PLANES)
    codes = (packed >> shift[None, :]) & ((1 << CODING.num_bits) - 1)
    meta_ptr = head_ptr.to(tl.pointer_type(tl.bfloat16))
    if CODING.per_channel:
        at = channel[None, :]
    else:
        at = (channel // CODING.group_channels)[None, :] * PAGE + tokens[:, None]
    scales = tl.load(meta_ptr + CODING.scales // 2 + at, mask=valid[None, :], other=0.0)
    mins = tl.load(meta_ptr + CODING.mins // 2 + at, mask=valid[None, :], other=0.0)
    steps = codes.to(tl.float32)
    if CODING.extra_bytes > 0:
        EXTRA: tl.constexpr = CODING.extra_bytes
        ptrs = head_ptr + CODING.extra + tokens[:, None] * EXTRA + (channel % EXTRA)[None, :]
        is_outlier = (valid & (channel < num_outliers(CODING)))[None, :]
        packed = tl.load(ptrs, mask=is_outlier, other=0).to(tl.int32)
        extra = (packed >> ((channel // EXTRA) * EXTRA_BITS)[None, :]) & (EXTRA_STEPS - 1)
        steps += tl.where(is_outlier, extra, 0).to(tl.float32) * (1.0 / EXTRA_STEPS)
    x = steps * scales.to(tl.float32) + mins.to(tl.float32)
    if CODING.rotation > 1:
        x = rotate_tile(x, channel, CODING.rotation, WIDTH, PADDED)
    return x


@triton.jit
def _fill_tensor(
    fresh_ptr, stride_t, stride_h, which: tl.constexpr, entry, head,
    page_ptr, sink_slot_ptr, touched_ptr, target_ptr, prior_ptr, first_ptr, end_ptr, start_ptr,
    pages_ptr, prior_rows_ptr, sink_rows_ptr, out_ptr,
    SINKS: tl.constexpr, OUT_DIM: tl.constexpr, CODING: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """One page of K (which = 0) or V (which = 1) of one head."""
    D: tl.constexpr = SPEC.head_dim
    ROW: tl.constexpr = SPEC.num_kv_heads * D
    PADDED: tl.constexpr = next_power_of_2(plane_width(SPEC, CODING))
    position = tl.arange(0, num_planes(CODING) * PADDED)
    channel = (position // PADDED) * plane_width(SPEC, CODING) + position % PADDED
    valid = position % PADDED < plane_width(SPEC, CODING)
    tokens = tl.arange(0, PAGE)
    rows = tokens.to(tl.int64)[:, None]
    touched = tl.load(touched_ptr + entry)
    target = tl.load(target_ptr + entry).to(tl.int64)
    out = out_ptr + (target + rows) * (SPEC.num_kv_heads * OUT_DIM)
    out = out + head * OUT_DIM + channel[None, :]
    if touched >= 0:
        first = tl.load(first_ptr + touched)
        end = tl.load(end_ptr + touched)
        start = tl.load(start_ptr + touched).to(tl.int64)
        is_fresh = ((tokens >= first) & (tokens < end))[:, None] & valid[None, :]
        ptrs = fresh_ptr + (start - first + rows) * stride_t + head * stride_h + channel[None, :]
        x = tl.load(ptrs, mask=is_fresh, other=0.0)
        if first > 0:
            prior = tl.load(prior_ptr + touched).to(tl.int64)
            ptrs = prior_rows_ptr + prior * (2 * PAGE * ROW) + which * PAGE * ROW
            ptrs = ptrs + rows * ROW + head * D + channel[None, :]
            is_prior = (tokens < first)[:, None] & valid[None, :]
            x = tl.where(is_prior, tl.load(ptrs, mask=is_prior, other=0.0), x)
        # Attention multiplies masked rows of other sequences by zero: they must be finite.
        wide = x.to(tl.float32)
        x = tl.where(wide == wide, tl.minimum(tl.maximum(wide, -LARGEST), LARGEST), 0.0)
        x = x.to(out_ptr.dtype.element_ty)
        tl.store(out, x, mask=(tokens < end)[:, None] & valid[None, :])
    else:
        page = tl.load(page_ptr + entry).to(tl.int64)
        head_ptr = pages_ptr + page * SPEC.page_bytes + head * SPEC.head_bytes
        if CODING.num_bits == 16:
            row_ptr = (head_ptr + CODING.codes).to(tl.pointer_type(out_ptr.dtype.element_ty))
            x = tl.load(row_ptr + tokens[:, None] * D + channel[None, :], mask=valid[None, :])
        elif is_packed(SPEC, CODING):
            x = page_planes(head_ptr, which == 0, CODING, SPEC, out_ptr.dtype.element_ty)
            if which == 0:
                x = tl.reshape(tl.permute(x, (0, 2, 1)), [PAGE, D])
            else:
                x = tl.reshape(tl.permute(x, (1, 2, 0)), [PAGE, D])
        else:
            x = _dequantize(head_ptr, tokens, position, channel, valid, CODING, which == 0, SPEC)
        x = x.to(out_ptr.dtype.element_ty)
        sink_slot = tl.load(sink_slot_ptr + entry).to(tl.int64)
        if SINKS > 0 and sink_slot > 0:
            ptrs = sink_rows_ptr + sink_slot * (2 * SINKS * ROW) + which * SINKS * ROW
            ptrs = ptrs + rows * ROW + head * D + channel[None, :]
            is_sink = (tokens < SINKS)[:, None] & valid[None, :]
            x = tl.where(is_sink, tl.load(ptrs, mask=is_sink, other=0.0), x)
        tl.store(out, x, mask=valid[None, :])


@triton.jit(do_not_specialize_on_alignment=(*FILLS, *TOUCHED))
def _fill_fwd_kernel(
    k_ptr, v_ptr, stride_kt, stride_kh, stride_vt, stride_vh,
    page_ptr, sink_slot_ptr, touched_ptr, target_ptr, prior_ptr, first_ptr, end_ptr, start_ptr,
    pages_ptr, prior_rows_ptr, sink_rows_ptr, k_out_ptr, v_out_ptr,
    SINKS: tl.constexpr, OUT_DIM: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Scratch rows [tokens, KV heads, OUT_DIM]: dequantized pages, or rows as they are."""
    entry = tl.program_id(0)
    head = tl.program_id(1)
    K: tl.constexpr = SPEC.k
    V: tl.constexpr = SPEC.v
    if tl.program_id(2) == 0:
        _fill_tensor(
            k_ptr, stride_kt, stride_kh, 0, entry, head,
            page_ptr, sink_slot_ptr, touched_ptr, target_ptr,
            prior_ptr, first_ptr, end_ptr, start_ptr,
            pages_ptr, prior_rows_ptr, sink_rows_ptr, k_out_ptr, SINKS, OUT_DIM, K, SPEC,
        )  # fmt: skip
    else:
        _fill_tensor(
            v_ptr, stride_vt, stride_vh, 1, entry, head,
            page_ptr, sink_slot_ptr, touched_ptr, target_ptr,
            prior_ptr, first_ptr, end_ptr, start_ptr,
            pages_ptr, prior_rows_ptr, sink_rows_ptr, v_out_ptr, SINKS, OUT_DIM, V, SPEC,
        )  # fmt: skip
