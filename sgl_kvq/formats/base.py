"""The page family: what a format states about K and about V."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sgl_kvq.errors import ConfigError

Axis = Literal["channel", "token"]
Rounding = Literal["even", "half_up"]

MAX_PARTITION = 64

PAGE_SIZE = 64
"""Tokens per page: the quantization block, the radix-tree granule and the wire block."""

EXTRA_BITS = 2
"""Low-order bits that an outlier channel has besides the coding's own."""

CLIP_RATIOS = (0.9, 0.8, 0.7, 0.6)
"""Clipping ratios tried by the MSE range search besides 1, as shares of maximum - minimum."""


def partition_size(head_dim: int) -> int:
    """Consecutive channels that share one scale: at most 64, dividing head_dim.

    Source: HACK (ATC '26), `min(64, head_dim)` lowered by 16 until it divides head_dim.
    """
    size = min(MAX_PARTITION, head_dim)
    while head_dim % size:
        size -= 16
    return size


def hadamard_order(head_dim: int, requested: int = 0) -> int:
    """Order of the diagonal Hadamard blocks: the largest power of two dividing head_dim, <= 128.

    Args:
        head_dim: Channels of a head.
        requested: A power of two to use instead, 0 for the default.

    Raises:
        ConfigError: `requested` does not divide head_dim.
    """
    if requested:
        if head_dim % requested:
            raise ConfigError(
                f"--kv-quant-hadamard-block: expected a divisor of head_dim {head_dim}, "
                f"got {requested}"
            )
        return requested
    return min(128, head_dim & -head_dim)


@dataclass(frozen=True)
class Coding:
    """How one of K and V is coded inside a closed page.

    value = code * scale + min, with one bfloat16 (scale, min) per group.

    Args:
        num_bits: 2, 4 or 8; 16 stores the rows as they are.
        axis: "channel": a group is one channel over the tokens of the page. "token": a group is
            `group_size` consecutive channels of one token.
        whole_head: On the token axis, one group spans the whole head instead of <= 64 channels.
        rotated: Channels are multiplied by a block-diagonal Hadamard matrix before coding.
        rounding: "even" rounds to nearest, ties to even; "half_up" is floor(x + 0.5).
        mse_clipping: (scale, min) is the one of several clipping ratios with the least squared
            error, instead of the range from minimum to maximum; not of outlier channels.
        outlier_16ths: K on the channel axis only: this many sixteenths of the channels, the
            leading ones, get `EXTRA_BITS` extra bits.
    """

    num_bits: int
    axis: Axis = "token"
    whole_head: bool = False
    rotated: bool = False
    rounding: Rounding = "even"
    mse_clipping: bool = False
    outlier_16ths: int = 0

    def __post_init__(self) -> None:
        if self.num_bits not in (2, 4, 8, 16):
            raise ValueError(f"num_bits: expected 2, 4, 8 or 16, got {self.num_bits}")
        if self.outlier_16ths and (self.axis != "channel" or self.num_bits not in (2, 4)):
            raise ValueError(
                f"outlier_16ths: expected 0 unless channels have scales and 2 or 4 bits, got "
                f"{self.outlier_16ths} with axis {self.axis} and {self.num_bits} bits"
            )

    @property
    def is_raw(self) -> bool:
        """Whether the page stores 16-bit rows, without metadata."""
        return self.num_bits == 16

    @property
    def max_code(self) -> int:
        """Largest code."""
        return int((1 << self.num_bits) - 1)

    @property
    def num_planes(self) -> int:
        """Codes per byte. Field i of byte j holds channel `i * head_dim / num_planes + j`."""
        return 8 // self.num_bits

    def num_outliers(self, head_dim: int) -> int:
        """Leading channels with `EXTRA_BITS` extra bits; they fill whole bytes."""
        per_byte = 8 // EXTRA_BITS
        return head_dim * self.outlier_16ths // 16 // per_byte * per_byte

    def num_groups(self, head_dim: int) -> int:
        """Groups of channels of one token (token axis), or channels (channel axis)."""
        if self.axis == "channel":
            return head_dim
        return 1 if self.whole_head else head_dim // partition_size(head_dim)


@dataclass(frozen=True)
class QuantFormat:
    """A named scheme: the coding of K and of V.

    Args:
        name: The value of `--kv-quant`.
        k: Coding of keys.
        v: Coding of values.
        source: Paper and section the mathematics comes from, and what we changed.
        own_basis: Heads are stored in a basis of their own, see `sgl_kvq.formats.calibration`.
    """

    name: str
    k: Coding
    v: Coding
    source: str
    own_basis: bool = False
