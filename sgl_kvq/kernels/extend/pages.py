"""Closed pages as tiles of 16-bit numbers in registers, in Triton.

Unrotated codes are unpacked two a 32-bit operation. A byte of codes is moved into the lower
mantissa bits of 128 (bfloat16, 7 bits) or 1024 (float16, 10 bits): with all fields but one masked
out, that is the number 128 + code * 2^position. One multiply-add with powers of two makes it the
code itself, exactly; another one applies scale and minimum, rounded once. Rotated codes, and those
whose planes are no power of two wide, are computed in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sgl_kvq.kernels.common.gluon import INTERPRET, constexpr_function
from sgl_kvq.kernels.common.layouts import (
    EXTRA_BITS,
    EXTRA_STEPS,
    PAGE,
    is_inside,
    next_power_of_2,
    num_outliers,
    num_planes,
    plane_width,
)
from sgl_kvq.kernels.common.page_spec import CodingSpec, PageSpec
from sgl_kvq.kernels.common.rotation import rotate_tile


@constexpr_function
def _is_packed(spec: PageSpec, coding: CodingSpec) -> bool:
    """Whether `_page_planes` reads a coding: unrotated codes in tiles without padding."""
    width = plane_width(spec, coding)
    return not coding.is_raw and coding.rotation == 1 and width & (width - 1) == 0


@constexpr_function
def _twice(half: int) -> str:
    return f"0x{half << 16 | half:08x}"


@constexpr_function
def _unpack_asm(num_bits: int, is_bfloat16: bool) -> str:
    """Four bytes to 8 / num_bits planes of four numbers each."""
    # Byte above a code, bits of it that hold codes, 2^-position, -offset * 2^-position.
    kind, high, usable = ("bf16x2", 0x43, 7) if is_bfloat16 else ("f16x2", 0x64, 8)
    scales = (0x3F80, 0x3E80, 0x3D80) if is_bfloat16 else (0x3C00, 0x3400, 0x2C00, 0x2400)
    offsets = (0xC300, 0xC200, 0xC100) if is_bfloat16 else (0xE400, 0xDC00, 0xD400, 0xCC00)
    planes = 8 // num_bits
    source = f"${2 * planes}"
    lines = [".reg .b32 w, l, h, x, s, o;"]
    shifted = -1
    for plane in range(planes):
        position = plane * num_bits
        shift = 0 if position + num_bits <= usable else 4
        if shift != shifted:
            lines.append(f"shr.u32 w, {source}, {shift};")
            lines.append(f"prmt.b32 l, w, 0x{high * 0x01010101:08x}, 0x4140;")
            lines.append(f"prmt.b32 h, w, 0x{high * 0x01010101:08x}, 0x4342;")
            shifted = shift
        position -= shift
        mask = _twice(0xFF00 | ((1 << num_bits) - 1) << position)
        step, offset = _twice(scales[position // 2]), _twice(offsets[position // 2])
        lines.append(f"mov.b32 s, {step}; mov.b32 o, {offset};")
        for register, half in enumerate("lh"):
            lines.append(f"and.b32 x, {half}, {mask};")
            lines.append(f"fma.rn.{kind} ${2 * plane + register}, x, s, o;")
    return "{" + " ".join(lines) + "}"


@constexpr_function
def _constraints(num_bits: int) -> str:
    return ",".join(["=r"] * (2 * (8 // num_bits)) + ["r"])


@constexpr_function
def _affine_asm(is_bfloat16: bool) -> str:
    return f"fma.rn.{'bf16x2' if is_bfloat16 else 'f16x2'} $0, $1, $2, $3;"


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 to 16 bits, to nearest; the interpreter would truncate to bfloat16."""
    if INTERPRET and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def _plane(packed, NUM_BITS: tl.constexpr, PLANE: tl.constexpr, DTYPE: tl.constexpr):
    codes = (packed.to(tl.int32) >> (NUM_BITS * PLANE)) & ((1 << NUM_BITS) - 1)
    return codes.to(tl.float32).to(DTYPE)


@triton.jit
def unpack(packed, NUM_BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Codes of each plane of uint8 bytes, exact, a tuple of tensors of DTYPE."""
    if NUM_BITS == 8:
        return (_plane(packed, 8, 0, DTYPE),)
    elif INTERPRET:
        planes = ()
        for plane in tl.static_range(8 // NUM_BITS):
            planes = planes + (_plane(packed, NUM_BITS, plane, DTYPE),)
        return planes
    elif NUM_BITS == 4:
        low, high = tl.inline_asm_elementwise(
            _unpack_asm(4, tl.bfloat16 == DTYPE), _constraints(4), [packed],
            dtype=(tl.int16, tl.int16), is_pure=True, pack=4,
        )  # fmt: skip
        return low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True)
    else:
        x0, x1, x2, x3 = tl.inline_asm_elementwise(
            _unpack_asm(2, tl.bfloat16 == DTYPE), _constraints(2), [packed],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=4,
        )  # fmt: skip
        x0, x1 = x0.to(DTYPE, bitcast=True), x1.to(DTYPE, bitcast=True)
        return x0, x1, x2.to(DTYPE, bitcast=True), x3.to(DTYPE, bitcast=True)


@triton.jit
def affine(steps, scales, mins):
    """steps * scales + mins of 16-bit numbers, rounded once."""
    if INTERPRET:
        wide = steps.to(tl.float32) * scales.to(tl.float32) + mins.to(tl.float32)
        return narrow(wide, steps.dtype)
    else:
        return tl.inline_asm_elementwise(
            _affine_asm(steps.dtype == tl.bfloat16), "=r,r,r,r", [steps, scales, mins],
            dtype=steps.dtype, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def _join(planes):
    """Tuple of 1, 2 or 4 tensors to one with a last dimension."""
    if len(planes) == 1:
        return tl.expand_dims(planes[0], -1)
    elif len(planes) == 2:
        return tl.join(planes[0], planes[1])
    else:
        pairs = tl.join(tl.join(planes[0], planes[2]), tl.join(planes[1], planes[3]))
        shape: tl.constexpr = pairs.shape[:-2] + [4]
        return tl.reshape(pairs, shape)


@triton.jit
def _plane_meta(
    head_ptr, at: tl.constexpr, plane: tl.constexpr, byte, tokens,
    IS_KEY: tl.constexpr, CODING: tl.constexpr, SPEC: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Scales or minima (at byte `at`) of a plane, ready to be broadcast to its codes."""
    WIDTH: tl.constexpr = plane_width(SPEC, CODING)
    meta_ptr = head_ptr.to(tl.pointer_type(tl.bfloat16)) + at // 2
    if CODING.per_channel:
        x = tl.load(meta_ptr + plane * WIDTH + byte).to(DTYPE)
        if IS_KEY:
            return x[None, :]
        else:
            return x[:, None]
    elif not is_inside(SPEC, CODING, plane, plane * WIDTH // CODING.group_channels):
        group = (plane * WIDTH + byte) // CODING.group_channels
        if IS_KEY:
            return tl.load(meta_ptr + group[None, :] * PAGE + tokens[:, None]).to(DTYPE)
        else:
            return tl.load(meta_ptr + group[:, None] * PAGE + tokens[None, :]).to(DTYPE)
    else:
        GROUP: tl.constexpr = plane * WIDTH // CODING.group_channels
        x = tl.load(meta_ptr + GROUP * PAGE + tokens).to(DTYPE)
        if IS_KEY:
            return x[:, None]
        else:
            return x[None, :]


@triton.jit
def _extra_steps(steps, head_ptr, plane: tl.constexpr, byte, tokens, SPEC: tl.constexpr):
    """Add the extra bits of a plane's outlier channels."""
    EXTRA: tl.constexpr = SPEC.k.extra_bytes
    channel = plane * plane_width(SPEC, SPEC.k) + byte
    is_outlier = (channel < num_outliers(SPEC.k))[None, :]
    ptrs = head_ptr + SPEC.k.extra + tokens[:, None] * EXTRA + (channel % EXTRA)[None, :]
    packed = tl.load(ptrs, mask=is_outlier, other=0).to(tl.int32)
    extra = (packed >> ((channel // EXTRA) * EXTRA_BITS)[None, :]) & (EXTRA_STEPS - 1)
    more = tl.where(is_outlier, extra, 0).to(tl.float32) * (1.0 / EXTRA_STEPS)
    return (steps.to(tl.float32) + more).to(steps.dtype)


@triton.jit
def _page_planes(
    head_ptr, IS_KEY: tl.constexpr,
    CODING: tl.constexpr, SPEC: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Keys [64 tokens, bytes, planes] or values [bytes, 64 tokens, planes] of a head of a page.

    Channel plane * plane_width + byte; in the rotated basis of a rotated coding.
    """
    WIDTH: tl.constexpr = plane_width(SPEC, CODING)
    byte = tl.arange(0, WIDTH)
    tokens = tl.arange(0, PAGE)
    if IS_KEY:
        packed = tl.load(head_ptr + CODING.codes + tokens[:, None] * WIDTH + byte[None, :])
    else:
        packed = tl.load(head_ptr + CODING.codes + byte[:, None] * PAGE + tokens[None, :])
    codes = unpack(packed, CODING.num_bits, DTYPE)
    planes = ()
    for plane in tl.static_range(num_planes(CODING)):
        steps = codes[plane]
        if plane * WIDTH < num_outliers(CODING):
            steps = _extra_steps(steps, head_ptr, plane, byte, tokens, SPEC)
        scales = _plane_meta(
            head_ptr, CODING.scales, plane, byte, tokens, IS_KEY, CODING, SPEC, DTYPE
        )
        mins = _plane_meta(head_ptr, CODING.mins, plane, byte, tokens, IS_KEY, CODING, SPEC, DTYPE)
        scales = tl.broadcast_to(scales, steps.shape)
        mins = tl.broadcast_to(mins, steps.shape)
        planes = planes + (affine(steps, scales, mins),)
    return _join(planes)


@triton.jit
def tile_channels(CODING: tl.constexpr, SPEC: tl.constexpr):
    """Channel of each position of a tile of `page_rows`, and whether it exists.

    Positions run plane by plane, each plane padded to a power of two.
    """
    WIDTH: tl.constexpr = plane_width(SPEC, CODING)
    PADDED: tl.constexpr = next_power_of_2(WIDTH)
    position = tl.arange(0, num_planes(CODING) * PADDED)
    return position // PADDED * WIDTH + position % PADDED, position % PADDED < WIDTH


@triton.jit
def _dequantize(head_ptr, IS_KEY: tl.constexpr, CODING: tl.constexpr, SPEC: tl.constexpr):
    """code * scale + min in float32 [64 tokens, positions], back in the unrotated basis."""
    PLANES: tl.constexpr = num_planes(CODING)
    WIDTH: tl.constexpr = plane_width(SPEC, CODING)
    PADDED: tl.constexpr = next_power_of_2(WIDTH)
    channel, valid = tile_channels(CODING, SPEC)
    position = tl.arange(0, PLANES * PADDED)
    byte = position % PADDED
    tokens = tl.arange(0, PAGE)
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
def page_rows(
    head_ptr, IS_KEY: tl.constexpr, CODING: tl.constexpr, SPEC: tl.constexpr, DTYPE: tl.constexpr
):
    """K or V of one head of a page, [64 tokens, positions] of DTYPE in the unrotated basis.

    `tile_channels` maps positions to channels.
    """
    if CODING.is_raw:
        channel, valid = tile_channels(CODING, SPEC)
        row_ptr = (head_ptr + CODING.codes).to(tl.pointer_type(DTYPE))
        ptrs = row_ptr + tl.arange(0, PAGE)[:, None] * SPEC.head_dim + channel[None, :]
        return tl.load(ptrs, mask=valid[None, :])
    elif _is_packed(SPEC, CODING):
        x = _page_planes(head_ptr, IS_KEY, CODING, SPEC, DTYPE)
        if IS_KEY:
            x = tl.permute(x, (0, 2, 1))
        else:
            x = tl.permute(x, (1, 2, 0))
        return tl.reshape(x, [PAGE, SPEC.head_dim])
    else:
        return _dequantize(head_ptr, IS_KEY, CODING, SPEC).to(DTYPE)
