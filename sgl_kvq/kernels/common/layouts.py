"""Numbers of a page that kernels need, and how the lanes of one warp hold a page.

The tensor core wants A operands (m16n8k16, 16 bits) with lane 4*g + t holding rows g and g + 8,
columns 2t, 2t + 1, 2t + 8, 2t + 9 of each 16 x 16 tile. A matrix product does not care in which
order rows and columns come, so codes are loaded in wide, coalesced pieces and the *names* of the
rows and columns are permuted until the registers of each lane are the ones the tensor core wants:
no shuffle, no shared memory. Letters in comments:

    g (8), t (4)      lane = 4*g + t
    h (2)             row g or g + 8 of a 16-row tile
    x (2), e (2)      neighbours in a 32-bit register; the lower or the upper 8 columns
    s                 16-column tile

Tokens of a page: token = 16*g[2:1] + 8*i1 + 4*i0 + 2*g[0] + h for MMA row 32*i1 + 16*i0 + 8*h + g.
The transposed probabilities (8 x 8 blocks, see `transpose_blocks`) then hold, lane by lane, exactly
the tokens that the value codes want.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from sgl_kvq.formats.base import EXTRA_BITS as _EXTRA_BITS
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.kernels.common.gluon import constexpr_function, gl
from sgl_kvq.kernels.common.page_spec import CodingSpec, PageSpec

PAGE: tl.constexpr = tl.constexpr(PAGE_SIZE)
EXTRA_BITS: tl.constexpr = tl.constexpr(_EXTRA_BITS)
EXTRA_STEPS: tl.constexpr = tl.constexpr(1 << _EXTRA_BITS)
EXTRA_PLANES: tl.constexpr = tl.constexpr(8 // _EXTRA_BITS)


@constexpr_function
def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@constexpr_function
def num_planes(coding: CodingSpec) -> int:
    """Codes in a byte; 1 for 16-bit rows."""
    return max(1, 8 // coding.num_bits)


@constexpr_function
def num_groups(spec: PageSpec, coding: CodingSpec) -> int:
    """Scales of one token; 1 on the channel axis."""
    return spec.head_dim // coding.group_channels


@constexpr_function
def padded_dim(spec: PageSpec) -> int:
    """head_dim as a power of two, at least 32."""
    return max(32, next_power_of_2(spec.head_dim))


@constexpr_function
def plane_width(spec: PageSpec, coding: CodingSpec) -> int:
    """Channels of one plane, which is also the bytes that a token's codes take."""
    return spec.head_dim // num_planes(coding)


@constexpr_function
def key_words(spec: PageSpec) -> int:
    """16-bit words of a key row, padded to whole MMA tiles."""
    return max(16, next_power_of_2(plane_width(spec, spec.k) // 2))


@constexpr_function
def value_rows(spec: PageSpec) -> int:
    """Rows of the output tile of one plane: byte rows of V padded to whole MMA tiles."""
    return max(16, next_power_of_2(plane_width(spec, spec.v)))


@constexpr_function
def meta_rows(spec: PageSpec, coding: CodingSpec) -> int:
    """Rows of 64 that scales and minima of the token axis take, as a power of two."""
    return next_power_of_2(2 * num_groups(spec, coding))


@constexpr_function
def overlaps(spec: PageSpec, coding: CodingSpec, plane: int, group: int) -> bool:
    """Whether a plane holds channels of a group."""
    width = plane_width(spec, coding)
    first, last = plane * width, (plane + 1) * width - 1
    return first // coding.group_channels <= group <= last // coding.group_channels


@constexpr_function
def is_inside(spec: PageSpec, coding: CodingSpec, plane: int, group: int) -> bool:
    """Whether all channels of a plane belong to a group."""
    width = plane_width(spec, coding)
    first, last = plane * width, (plane + 1) * width - 1
    return first // coding.group_channels == group == last // coding.group_channels


@constexpr_function
def plane_scale(coding: CodingSpec, plane: int) -> float:
    """Factor from a field that is left at its bit position to its code."""
    return float(2.0 ** (-coding.num_bits * plane))


@constexpr_function
def num_outliers(coding: CodingSpec) -> int:
    """Leading channels with extra bits."""
    return coding.extra_bytes * (8 // _EXTRA_BITS)


@constexpr_function
def num_extra_tiles(coding: CodingSpec) -> int:
    """MMA tiles of 16 columns that a token's extra bits take."""
    return -(-coding.extra_bytes // 16)


@constexpr_function
def extra_width(coding: CodingSpec) -> int:
    """Different bytes in the 16 columns of an extra-bit tile: 4, 8 or 16."""
    return min(16, max(4, next_power_of_2(coding.extra_bytes)))


@constexpr_function
def num_extra_steps(coding: CodingSpec) -> int:
    """Products for an extra-bit tile. It holds narrow rows several times, each for other planes."""
    return (8 // _EXTRA_BITS) * extra_width(coding) // 16


@constexpr_function
def extra_scale(step: int) -> float:
    """Factor from a field of extra bits that is left at its position to units of a code."""
    return float(2.0 ** (-_EXTRA_BITS * (step + 1)))


@constexpr_function
def mma_layout() -> Any:
    """Accumulators of m16n8k16 in one warp."""
    return gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])


@constexpr_function
def a_layout() -> Any:
    """Left operand, 16-bit elements."""
    return gl.DotOperandLayout(0, mma_layout(), 2)


@constexpr_function
def b_layout() -> Any:
    """Right operand, 16-bit elements."""
    return gl.DotOperandLayout(1, mma_layout(), 2)


@constexpr_function
def _doublings(start: int, end: int) -> list[int]:
    values = []
    while start < end:
        values.append(start)
        start *= 2
    return values


@constexpr_function
def key_code_layout(spec: PageSpec) -> Any:
    """[64 tokens, words] int16 as loaded: a lane takes 8 or 16 contiguous bytes of 8 tokens."""
    words = key_words(spec)
    per_lane = 4 if words == 16 else 8
    regs = [[0, w] for w in _doublings(1, per_lane)]
    regs += [[0, w] for w in _doublings(4 * per_lane, words)]
    regs += [[1, 0], [4, 0], [8, 0]]
    lanes = [[0, per_lane], [0, 2 * per_lane], [2, 0], [16, 0], [32, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [], [], [64, words])


@constexpr_function
def channel_meta_layout(spec: PageSpec) -> Any:
    """[planes, key bytes] bfloat16: the scales of the channels that a lane's key codes hold."""
    words, planes = key_words(spec), num_planes(spec.k)
    per_lane = 8 if words == 16 else 16
    regs = [[0, b] for b in _doublings(1, per_lane)]
    regs += [[0, b] for b in _doublings(4 * per_lane, 2 * words)]
    regs += [[p, 0] for p in _doublings(1, planes)]
    lanes = [[0, per_lane], [0, 2 * per_lane], [0, 0], [0, 0], [0, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [], [], [planes, 2 * words])


@constexpr_function
def extra_layout() -> Any:
    """[64 tokens, 8] int16 as loaded: two neighbours of 8 tokens a lane."""
    lanes = [[0, 2], [0, 4], [2, 0], [16, 0], [32, 0]]
    return gl.DistributedLinearLayout([[0, 1], [1, 0], [4, 0], [8, 0]], lanes, [], [], [64, 8])


@constexpr_function
def token_meta_layout() -> Any:
    """[1, 64 tokens]: the tokens of a lane's accumulator rows."""
    lanes = [[0, 0], [0, 0], [0, 2], [0, 16], [0, 32]]
    return gl.DistributedLinearLayout([[0, 1], [0, 4], [0, 8]], lanes, [], [], [1, 64])


@constexpr_function
def channel_vector_layout(dim: int) -> Any:
    """[1, dim]: 8 contiguous channels a lane, the same for all g."""
    regs = [[0, 1], [0, 2], [0, 4], *([0, c] for c in _doublings(32, dim))]
    lanes = [[0, 8], [0, 16], [0, 0], [0, 0], [0, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [], [], [1, dim])


@constexpr_function
def query_layout(dim: int, heads: int) -> Any:
    """[heads, dim]: 8 contiguous channels a lane of heads g and g + 8."""
    regs = [[0, 1], [0, 2], [0, 4], *([0, c] for c in _doublings(32, dim))]
    regs += [[n, 0] for n in _doublings(8, heads)]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [], [], [heads, dim])


@constexpr_function
def code_query_layout(spec: PageSpec, heads: int) -> Any:
    """[heads, planes * key bytes]: the channels that a lane's key codes hold; see above."""
    words, planes = key_words(spec), num_planes(spec.k)
    per_lane = 8 if words == 16 else 16
    regs = [[0, b] for b in _doublings(1, per_lane)]
    regs += [[0, b] for b in _doublings(4 * per_lane, 2 * words * planes)]
    regs += [[n, 0] for n in _doublings(8, heads)]
    lanes = [[0, per_lane], [0, 2 * per_lane], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [], [], [heads, planes * 2 * words])


@constexpr_function
def extra_meta_layout() -> Any:
    """[16] bfloat16: the scales of the four neighbouring extra-bit bytes that a lane holds."""
    return gl.DistributedLinearLayout([[1], [2]], [[4], [8], [0], [0], [0]], [], [], [16])


@constexpr_function
def row_layout(dim: int) -> Any:
    """[16 rows, dim] 16-bit: 8 contiguous channels a lane of rows g and g + 8."""
    regs = [[0, 1], [0, 2], [0, 4], *([0, c] for c in _doublings(32, dim)), [8, 0]]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [], [], [16, dim])


@constexpr_function
def value_code_layout(spec: PageSpec) -> Any:
    """[rows, 32 words] int16: 16 contiguous bytes, that is 16 tokens, a lane of rows g + 8n."""
    rows = value_rows(spec)
    regs = [[0, 1], [0, 2], [0, 4], *([r, 0] for r in _doublings(8, rows))]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [], [], [rows, 32])


@constexpr_function
def value_row_layout(rows: int) -> Any:
    """[16 tokens, rows] 16-bit values in 8 x 8 blocks, ready for `transpose_blocks`."""
    regs = [[0, 1], [8, 0], *([0, r] for r in _doublings(8, rows))]
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [], [], [16, rows])


@constexpr_function
def block_layout(rows: int, heads: int) -> Any:
    """[rows / 8, 8, heads]: accumulators by 8-row blocks."""
    regs = [[0, 0, 1], *([0, 0, n] for n in _doublings(8, heads))]
    regs += [[b, 0, 0] for b in _doublings(1, rows // 8)]
    lanes = [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [], [], [rows // 8, 8, heads])


@constexpr_function
def lane_sum_layout(heads: int) -> Any:
    """[8, heads]: one partial sum a lane and column, added up over g at the end."""
    regs = [[0, 1], *([0, n] for n in _doublings(8, heads))]
    return gl.DistributedLinearLayout(
        regs, [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [], [], [8, heads]
    )


@constexpr_function
def copy_layout(cols: int) -> Any:
    """[any, cols] 16-bit elements, 16 contiguous bytes a lane: what an asynchronous copy moves."""
    lanes = min(32, max(1, cols // 8))
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [1, 1], [1, 0])


@constexpr_function
def shared_layout() -> Any:
    """Plain row-major shared memory, [rows, columns]."""
    return gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
