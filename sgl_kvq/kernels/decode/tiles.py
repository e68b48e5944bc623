"""Tiles of a page in the registers of one warp: unpacking, transposition, sums.

Codes are never converted. A 2- or 4-bit field that is masked out of a 16-bit word, left where it
is, *is* a float16 number: a subnormal of value code * 2^(bits * plane) * 2^-24, which the tensor
core multiplies exactly. One `and` yields two operands; the powers of two are undone in the other
factor (keys) or in the result (values).
"""

from __future__ import annotations

import triton.language as tl

from sgl_kvq.kernels.common.gluon import INTERPRET, constexpr_function, gl, jit
from sgl_kvq.kernels.common.layouts import (
    PAGE,
    a_layout,
    b_layout,
    block_layout,
    key_words,
    lane_sum_layout,
    mma_layout,
    num_planes,
    padded_dim,
    token_meta_layout,
    value_rows,
)

CODE_UNIT: tl.constexpr = tl.constexpr(2.0**24)  # 1 / the smallest float16 subnormal


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
    """Shift the upper byte of each int16 word down; upper bits are garbage and masked later."""
    if INTERPRET:
        return (words >> 8).to(gl.int16)
    else:
        return gl.inline_asm_elementwise(
            "shr.u32 $0, $1, 8;", "=r,r", [words], dtype=gl.int16, is_pure=True, pack=2
        )


@jit
def shift_down(words, bits):
    """Shift int16 words right by an int32 number of bits, the same for both words of a register.

    The upper bits of the lower word, as many as the shift, are garbage and masked later.
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
