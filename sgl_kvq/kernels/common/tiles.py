"""Tiles of a page in the registers of one warp: loads, unpacking, transposition.

Codes are never converted. A 2- or 4-bit field that is masked out of a 16-bit word, left where it
is, *is* a float16 number: a subnormal of value code * 2^(bits * plane) * 2^-24, which the tensor
core multiplies exactly. One `and` yields two operands; the powers of two are undone in the other
factor (keys) or in the result (values).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

from sgl_kvq.kernels.common.gluon import INTERPRET, async_copy, constexpr_function, gl, jit
from sgl_kvq.kernels.common.layouts import (
    EXTRA_BITS,
    EXTRA_PLANES,
    PAGE,
    a_layout,
    b_layout,
    block_layout,
    copy_layout,
    extra_layout,
    extra_width,
    key_words,
    lane_sum_layout,
    meta_rows,
    mma_layout,
    num_extra_steps,
    num_groups,
    num_planes,
    padded_dim,
    plane_width,
    shared_layout,
    token_meta_layout,
    value_rows,
)

CODE_UNIT: tl.constexpr = tl.constexpr(2.0**24)  # 1 / the smallest float16 subnormal


class PageBuffers(NamedTuple):
    """Shared memory for some pages of one head; the first dimension of each counts pages.

    Args:
        k_codes: int16 [stages, PAGE, key_words].
        k_scales: bfloat16 [stages, planes, 2 * key_words] with a scale a channel, otherwise
            [stages, meta_rows, PAGE], minima behind the scales.
        k_mins: bfloat16 [stages, 1, padded_dim] with a minimum a channel, otherwise `k_scales`.
        v_codes: int16 [stages, value_rows, 32].
        v_meta: bfloat16 [stages, meta_rows, PAGE], scales and minima of tokens; not to be read
            with a scale a channel.
    """

    k_codes: Any
    k_scales: Any
    k_mins: Any
    v_codes: Any
    v_meta: Any


@constexpr_function
def _mask(num_bits: int, plane: int) -> int:
    return ((1 << num_bits) - 1) << (num_bits * plane)


@constexpr_function
def _mask_asm(num_bits: int, plane: int) -> str:
    mask = _mask(num_bits, plane)
    return f"and.b32 $0, $1, 0x{mask | mask << 16:08x};"


@jit
def mask_field(words, num_bits: tl.constexpr, plane: tl.constexpr):
    """Field `plane` of the lower byte of each int16 word, as float16 subnormals."""
    if INTERPRET:
        return (words & _mask(num_bits, plane)).to(gl.float16, bitcast=True)
    else:
        return gl.inline_asm_elementwise(
            _mask_asm(num_bits, plane), "=r,r", [words], dtype=gl.float16, is_pure=True, pack=2
        )


@jit
def upper_bytes(words):
    """Shift the upper byte of each int16 word down; what was above it is left to be masked."""
    if INTERPRET:
        return (words >> 8).to(gl.int16)
    else:
        return gl.inline_asm_elementwise(
            "shr.u32 $0, $1, 8;", "=r,r", [words], dtype=gl.int16, is_pure=True, pack=2
        )


@jit
def shift_down(words, bits):
    """Shift int16 words right by an int32 number of bits, the same for both words of a register.

    The upper bits of the lower word, as many as the shift, are left to be masked.
    """
    words, bits = gl.broadcast(words, bits)
    if INTERPRET:
        return words >> bits.to(gl.int16)
    else:
        return gl.inline_asm_elementwise(
            "shr.u32 $0, $1, $2;",
            "=r,r,r,r",
            [words, bits],
            dtype=gl.int16,
            is_pure=True,
            pack=2,
        )


@jit
def widen(x):
    """bfloat16 pairs of a lane to float32, one operation a number."""
    if INTERPRET:
        return x.to(gl.float32)
    else:
        return gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r",
            [x],
            dtype=gl.float32,
            is_pure=True,
            pack=2,
        )


@jit
def transpose_blocks(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Transpose each 8 x 8 block of a 16-bit [ROWS, COLS] tile, blocks stay where they are."""
    if INTERPRET:
        blocks = gl.reshape(x, [ROWS // 8, 8, COLS // 8, 8])
        return gl.reshape(gl.permute(blocks, [0, 3, 2, 1]), [ROWS, COLS])
    else:
        return gl.inline_asm_elementwise(
            "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;",
            "=r,r",
            [x],
            dtype=x.dtype,
            is_pure=True,
            pack=2,
        )


@jit
def split_last(x, NUM_BITS: tl.constexpr):
    """Split NUM_BITS trailing dimensions of size 2 into a tuple; the last one varies slowest."""
    if NUM_BITS == 0:
        return (x,)
    else:
        low, high = gl.split(x)
        return split_last(low, NUM_BITS - 1) + split_last(high, NUM_BITS - 1)


@jit
def allocate_page(STAGES: tl.constexpr, SPEC: tl.constexpr):
    """Allocate `PageBuffers` for STAGES pages."""
    LAYOUT: tl.constexpr = shared_layout()
    k_codes = gl.allocate_shared_memory(gl.int16, [STAGES, PAGE, key_words(SPEC)], LAYOUT)
    if SPEC.k.per_channel:
        WIDTH: tl.constexpr = 2 * key_words(SPEC)
        k_scales = gl.allocate_shared_memory(
            gl.bfloat16, [STAGES, num_planes(SPEC.k), WIDTH], LAYOUT
        )
        k_mins = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, padded_dim(SPEC)], LAYOUT)
    else:
        k_scales = gl.allocate_shared_memory(
            gl.bfloat16, [STAGES, meta_rows(SPEC, SPEC.k), PAGE], LAYOUT
        )
        k_mins = k_scales
    v_codes = gl.allocate_shared_memory(gl.int16, [STAGES, value_rows(SPEC), 32], LAYOUT)
    v_meta = v_codes
    if not SPEC.v.per_channel:
        v_meta = gl.allocate_shared_memory(
            gl.bfloat16, [STAGES, meta_rows(SPEC, SPEC.v), PAGE], LAYOUT
        )
    return PageBuffers(k_codes, k_scales, k_mins, v_codes, v_meta)


@jit
def _copy_tile(
    buffer, base_ptr, wanted, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
    ALL_ROWS: tl.constexpr, ALL_COLS: tl.constexpr,
):  # fmt: skip
    """Start copying [ROWS, COLS] elements, WIDTH apart, into a buffer of [ALL_ROWS, ALL_COLS]."""
    if ROWS == ALL_ROWS and COLS == ALL_COLS and WIDTH == COLS:
        # One piece: every such copy has the same offsets in a lane, which saves address arithmetic.
        FLAT: tl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
        ptrs = base_ptr + gl.arange(0, ROWS * COLS, FLAT)
        buffer = buffer.reshape([ROWS * COLS])
        async_copy.async_copy_global_to_shared(buffer, ptrs, mask=wanted)
    else:
        LAYOUT: tl.constexpr = copy_layout(ALL_COLS)
        rows = gl.arange(0, ALL_ROWS, gl.SliceLayout(1, LAYOUT))[:, None]
        cols = gl.arange(0, ALL_COLS, gl.SliceLayout(0, LAYOUT))[None, :]
        mask = (rows < ROWS) & (cols < COLS) & wanted
        async_copy.async_copy_global_to_shared(buffer, base_ptr + rows * WIDTH + cols, mask=mask)


@jit
def start_page(buffers, stage, head_ptr, wanted, SPEC: tl.constexpr):
    """Start copying one head's slice of a page into a stage of the buffers, if it is wanted.

    The copies are one group of `async_copy`, also when nothing is wanted.
    """
    words_ptr = head_ptr.to(gl.pointer_type(gl.int16))
    meta_ptr = head_ptr.to(gl.pointer_type(gl.bfloat16))
    WORDS: tl.constexpr = plane_width(SPEC, SPEC.k) // 2
    _copy_tile(
        buffers.k_codes.index(stage), words_ptr + SPEC.k.codes // 2, wanted,
        PAGE, WORDS, WORDS, PAGE, key_words(SPEC),
    )  # fmt: skip
    if SPEC.k.per_channel:
        PLANES: tl.constexpr = num_planes(SPEC.k)
        WIDTH: tl.constexpr = plane_width(SPEC, SPEC.k)
        _copy_tile(
            buffers.k_scales.index(stage), meta_ptr + SPEC.k.scales // 2, wanted,
            PLANES, WIDTH, WIDTH, PLANES, 2 * key_words(SPEC),
        )  # fmt: skip
        _copy_tile(
            buffers.k_mins.index(stage), meta_ptr + SPEC.k.mins // 2, wanted,
            1, SPEC.head_dim, SPEC.head_dim, 1, padded_dim(SPEC),
        )  # fmt: skip
    else:
        GROUPS: tl.constexpr = num_groups(SPEC, SPEC.k)
        _copy_tile(
            buffers.k_scales.index(stage), meta_ptr + SPEC.k.scales // 2, wanted,
            2 * GROUPS, PAGE, PAGE, meta_rows(SPEC, SPEC.k), PAGE,
        )  # fmt: skip
    ROWS: tl.constexpr = plane_width(SPEC, SPEC.v)
    _copy_tile(
        buffers.v_codes.index(stage), words_ptr + SPEC.v.codes // 2, wanted,
        ROWS, 32, 32, value_rows(SPEC), 32,
    )  # fmt: skip
    if not SPEC.v.per_channel:
        GROUPS_V: tl.constexpr = num_groups(SPEC, SPEC.v)
        _copy_tile(
            buffers.v_meta.index(stage), meta_ptr + SPEC.v.scales // 2, wanted,
            2 * GROUPS_V, PAGE, PAGE, meta_rows(SPEC, SPEC.v), PAGE,
        )  # fmt: skip
    async_copy.commit_group()


@jit
def token_meta(meta, index: tl.constexpr):
    """One bfloat16 vector [64] of a staged page, by MMA row [64, 1] in float32."""
    x = meta.slice(index, 1, 0).load(token_meta_layout())
    ROWS: tl.constexpr = gl.SliceLayout(1, mma_layout())
    return rows_by_token(gl.reshape(widen(x), [PAGE]), ROWS)[:, None]


@jit
def channel_of(k):
    """Which channel stands in column k of an operand loaded with `channel_vector_layout`."""
    return (k // 32) * 32 + ((k % 8) // 2) * 8 + ((k // 16) % 2) * 4 + ((k // 8) % 2) * 2 + k % 2


@jit
def rows_by_token(x, LAYOUT: tl.constexpr):
    """Reorder [64] from tokens to MMA rows."""
    x = gl.permute(gl.reshape(x, [4, 2, 2, 2, 2]), [1, 2, 4, 0, 3])
    return gl.convert_layout(gl.reshape(x, [64]), LAYOUT, assert_trivial=True)


@jit
def token_of_row(m):
    """Which token of a page stands in MMA row m."""
    return ((m % 8) // 2) * 16 + (m // 32) * 8 + ((m // 16) % 2) * 4 + (m % 2) * 2 + (m // 8) % 2


@jit
def columns_in_order(x, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Reorder [ROWS, DIM], 8-element pieces a lane, into operand columns; see `channel_of`."""
    x = gl.permute(gl.reshape(x, [ROWS, DIM // 32, 4, 2, 2, 2]), [0, 1, 3, 4, 2, 5])
    return gl.reshape(x, [ROWS, DIM])


@jit
def key_operand(codes, SPEC: tl.constexpr):
    """Loaded key codes as left operand [64 MMA rows, words]."""
    WORDS: tl.constexpr = key_words(SPEC)
    codes = gl.permute(gl.reshape(codes, [4, 2, 2, 2, 2, WORDS]), [1, 2, 4, 0, 3, 5])
    if WORDS == 16:
        codes = gl.permute(gl.reshape(codes, [64, 4, 2, 2]), [0, 2, 1, 3])
        codes = gl.reshape(codes, [64, 16])
    else:
        codes = columns_in_order(gl.reshape(codes, [64, WORDS]), 64, WORDS)
    return gl.convert_layout(codes, a_layout(), assert_trivial=True)


@jit
def extra_tile(extra_ptr, part: tl.constexpr, SPEC: tl.constexpr):
    """extra bits of a token's outlier channels, as left operand [64 MMA rows, 16].

    Column k holds byte 2 * (k % 8) + k // 8 in its lower half, shifted until the plane of the first
    step is lowest (see `extra_place`); what is above the planes of all steps is to be masked.
    Columns without a channel hold bytes of what follows; they meet queries of zero.
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
def extra_place(byte, part: tl.constexpr, step: tl.constexpr, SPEC: tl.constexpr):
    """Channel of the extra bits that a step takes from byte 0 to 15 of a tile; whether it exists.

    A tile holds `16 // extra_width` copies of a token's bytes, each for planes of its own.
    """
    WIDTH: tl.constexpr = extra_width(SPEC.k)
    plane = byte // WIDTH * num_extra_steps(SPEC.k) + step
    at = part * 16 + byte % WIDTH
    return plane * SPEC.k.extra_bytes + at, at < SPEC.k.extra_bytes


@jit
def value_operand(codes, SPEC: tl.constexpr):
    """Loaded value codes as left operand [byte rows, words]."""
    codes = columns_in_order(codes, value_rows(SPEC), 32)
    return gl.convert_layout(codes, a_layout(), assert_trivial=True)


@constexpr_function
def _key_part(planes: int, half: int, plane: int) -> int:
    # `split_last` takes the byte's half first, then the plane's bits from the lowest up.
    index = half
    while planes > 1:
        index = index * 2 + plane % 2
        plane //= 2
        planes //= 2
    return index


@constexpr_function
def _log2(n: int) -> int:
    return n.bit_length() - 1


@jit
def split_key_channels(x, HEADS: tl.constexpr, SPEC: tl.constexpr):
    """[HEADS, planes * key bytes] by channel as a tuple of [words, HEADS]; see `key_part`."""
    PLANES: tl.constexpr = num_planes(SPEC.k)
    WORDS: tl.constexpr = key_words(SPEC)
    # [heads, plane, (tile pairs), t, (tile), e, x, half] -> [words in operand order, heads, ...]
    if WORDS == 16:
        x = gl.permute(gl.reshape(x, [HEADS, PLANES, 4, 2, 2, 2]), [3, 2, 4, 0, 1, 5])
    else:
        x = gl.reshape(x, [HEADS, PLANES, WORDS // 32, 4, 2, 2, 2, 2])
        x = gl.permute(x, [2, 4, 5, 3, 6, 0, 1, 7])
    if PLANES == 4:
        x = gl.reshape(x, [WORDS, HEADS, 2, 2, 2])
    elif PLANES == 2:
        x = gl.reshape(x, [WORDS, HEADS, 2, 2])
    else:
        x = gl.reshape(x, [WORDS, HEADS, 2])
    return split_last(x, _log2(PLANES) + 1)


@jit
def key_part(parts, half: tl.constexpr, plane: tl.constexpr, SPEC: tl.constexpr):
    """[words, HEADS] of one byte half and plane, out of `split_key_channels`."""
    return parts[_key_part(num_planes(SPEC.k), half, plane)]


@jit
def key_scale(parts, half: tl.constexpr, plane: tl.constexpr, SPEC: tl.constexpr):
    """float16 [words, 1]: scales of one byte half and plane, in the right operand's layout."""
    part = gl.reshape(key_part(parts, half, plane, SPEC), [key_words(SPEC)])
    return gl.convert_layout(part, gl.SliceLayout(1, b_layout()), assert_trivial=True)[:, None]


@jit
def extra_scale_operand(vector):
    """[16] by extra-bit byte as rows of the right operand that meets `extra_tile`: [16, 1]."""
    vector = gl.reshape(gl.permute(gl.reshape(vector, [4, 2, 2]), [2, 0, 1]), [16])
    return gl.convert_layout(vector, gl.SliceLayout(1, b_layout()), assert_trivial=True)[:, None]


@jit
def channel_operand(vector, SPEC: tl.constexpr):
    """A [1, padded_dim] vector as left operand [16, padded_dim] whose rows are all alike."""
    DIM: tl.constexpr = padded_dim(SPEC)
    vector = gl.convert_layout(
        gl.reshape(columns_in_order(vector, 1, DIM), [DIM]),
        gl.SliceLayout(0, a_layout()),
        assert_trivial=True,
    )
    rows, _ = gl.broadcast(vector[None, :], gl.zeros([16, 1], gl.bfloat16, a_layout()))
    return rows


@jit
def sum_in_lane(x, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """Add accumulators [ROWS, HEADS] over the 8-row blocks a lane holds: [8, HEADS], no shuffle."""
    x = gl.convert_layout(
        gl.reshape(x, [ROWS // 8, 8, HEADS]), block_layout(ROWS, HEADS), assert_trivial=True
    )
    return gl.convert_layout(gl.sum(x, axis=0), lane_sum_layout(HEADS), assert_trivial=True)


@jit
def first_block(x, HEADS: tl.constexpr):
    """Rows 0 to 7 of accumulators [16, HEADS]."""
    x = gl.permute(gl.reshape(x, [2, 8, HEADS]), [1, 2, 0])
    low, _high = gl.split(x)
    return gl.convert_layout(low, lane_sum_layout(HEADS), assert_trivial=True)


@jit
def add_to_blocks(x, block, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """Add [8, HEADS] to each 8-row block of accumulators [ROWS, HEADS]."""
    LAYOUT: tl.constexpr = block_layout(ROWS, HEADS)
    x = gl.convert_layout(gl.reshape(x, [ROWS // 8, 8, HEADS]), LAYOUT, assert_trivial=True)
    block = gl.convert_layout(block, gl.SliceLayout(0, LAYOUT), assert_trivial=True)
    x = gl.reshape(x + gl.expand_dims(block, 0), [ROWS, HEADS])
    return gl.convert_layout(x, mma_layout(), assert_trivial=True)
