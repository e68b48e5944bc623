"""Products with the extra bits of outlier key channels.

A token's extra bits are 8 / EXTRA_BITS planes of bytes, as its codes are. They lie at odd places of
the page, so they are loaded to registers a page ahead instead of being copied to shared memory.
"""

from __future__ import annotations

import triton.language as tl

from sgl_kvq.kernels.common.gluon import gl, jit, mma_v2
from sgl_kvq.kernels.common.layouts import (
    EXTRA_BITS,
    EXTRA_PLANES,
    PAGE,
    a_layout,
    b_layout,
    extra_layout,
    extra_meta_layout,
    extra_scale,
    extra_width,
    num_extra_steps,
    num_extra_tiles,
)
from sgl_kvq.kernels.decode.tiles import mask_field, shift_down, upper_bytes


@jit
def _extra_tile(extra_ptr, part: tl.constexpr, SPEC: tl.constexpr):
    """Load extra bits of outlier channels as left operand [64 MMA rows, 16].

    Column k holds byte 2 * (k % 8) + k // 8 in its lower half, shifted until the plane of the first
    step is lowest (see `_extra_place`). Upper bits are garbage and masked by the caller. Padding
    columns hold bytes of the next field; they are multiplied by zero queries.
    """
    EXTRA: tl.constexpr = SPEC.k.extra_bytes
    tokens = gl.arange(0, PAGE, gl.SliceLayout(1, extra_layout()))
    word = gl.arange(0, 8, gl.SliceLayout(0, extra_layout()))
    WORDS: tl.constexpr = extra_width(SPEC.k) // 2
    shift = word // WORDS * (EXTRA_BITS * num_extra_steps(SPEC.k))
    word = part * 8 + word % WORDS
    if EXTRA % 2 == 0:
        words_ptr = extra_ptr.to(gl.pointer_type(gl.int16))
        ptrs = words_ptr + tokens[:, None] * (EXTRA // 2) + word[None, :]
        even = gl.load(ptrs)
        if num_extra_steps(SPEC.k) < EXTRA_PLANES:
            even = shift_down(even, shift[None, :])
        odd = upper_bytes(even)
    else:
        ptrs = extra_ptr + tokens[:, None] * EXTRA + 2 * word[None, :]
        even = gl.load(ptrs).to(gl.int16)
        odd = gl.load(ptrs + 1).to(gl.int16)
        even = even >> shift[None, :].to(gl.int16)
        odd = odd >> shift[None, :].to(gl.int16)
    x = gl.permute(gl.reshape(gl.join(even, odd), [4, 2, 2, 2, 2, 8, 2]), [1, 2, 4, 0, 3, 6, 5])
    return gl.convert_layout(gl.reshape(x, [64, 16]), a_layout(), assert_trivial=True)


@jit
def _extra_place(byte, part: tl.constexpr, step: tl.constexpr, SPEC: tl.constexpr):
    """Map (byte of a tile, step) to a channel; also return whether the channel exists.

    A tile holds `16 // extra_width` copies of a token's bytes, each shifted to other planes.
    """
    WIDTH: tl.constexpr = extra_width(SPEC.k)
    plane = byte // WIDTH * num_extra_steps(SPEC.k) + step
    at = part * 16 + byte % WIDTH
    return plane * SPEC.k.extra_bytes + at, at < SPEC.k.extra_bytes


@jit
def _extra_scales(vector):
    """Scales [16] by byte of a tile as rows [16, 1] of the right operand."""
    vector = gl.reshape(gl.permute(gl.reshape(vector, [4, 2, 2]), [2, 0, 1]), [16])
    return gl.convert_layout(vector, gl.SliceLayout(1, b_layout()), assert_trivial=True)[:, None]


@jit
def extra_queries(
    q_ptr, stride_h, inverse_norm, HEADS: tl.constexpr, GQA: tl.constexpr, SPEC: tl.constexpr
):
    """Operands for the extra bits of outlier channels, by tile and step."""
    heads = gl.arange(0, HEADS, gl.SliceLayout(0, b_layout()))
    k = gl.arange(0, 16, gl.SliceLayout(1, b_layout()))
    operands = ()
    for part in tl.static_range(num_extra_tiles(SPEC.k)):
        steps = ()
        for step in tl.static_range(num_extra_steps(SPEC.k)):
            channel, valid = _extra_place(2 * (k % 8) + k // 8, part, step, SPEC)
            ptrs = q_ptr + heads[None, :] * stride_h + channel[:, None]
            mask = valid[:, None] & (heads < GQA)[None, :]
            q = gl.load(ptrs, mask=mask, other=0.0).to(gl.float32)
            q = q * (inverse_norm[None, :] * extra_scale(step))
            steps = steps + (q.to(gl.float16),)
        operands = operands + (steps,)
    return operands


@jit
def fetch_extra(head_ptr, SPEC: tl.constexpr):
    """Load the extra bits of outlier key channels and their scales into registers.

    Returns:
        For each tile (bits as left operand, scales [16] of each step); empty without outlier
        channels. Padding has the scales or minima of other channels: they are finite, and
        multiplied by zero queries.
    """
    meta_ptr = head_ptr.to(gl.pointer_type(gl.bfloat16)) + SPEC.k.scales // 2
    byte = gl.arange(0, 16, extra_meta_layout())
    tiles = ()
    for part in tl.static_range(num_extra_tiles(SPEC.k)):
        bits = _extra_tile(head_ptr + SPEC.k.extra, part, SPEC)
        scales = ()
        for step in tl.static_range(num_extra_steps(SPEC.k)):
            channel, _exists = _extra_place(byte, part, step, SPEC)
            scales = scales + (gl.load(meta_ptr + channel),)
        tiles = tiles + ((bits, scales),)
    return tiles


@jit
def add_extra(s, extra, q_extra, SPEC: tl.constexpr):
    """Add the products with the extra bits of outlier channels to s."""
    for part in tl.static_range(num_extra_tiles(SPEC.k)):
        bits, scales = extra[part]
        for step in tl.static_range(num_extra_steps(SPEC.k)):
            q = q_extra[part][step] * _extra_scales(scales[step].to(gl.float16))
            s = mma_v2(mask_field(bits, EXTRA_BITS, step), q, s)
    return s
