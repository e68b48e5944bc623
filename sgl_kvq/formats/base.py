"""What a format states: how K and V are coded, which fields a page has, how it is calibrated.

Nothing here imports torch: a format is a description until its pages are written or read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from sgl_kvq.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from sgl_kvq.formats.page_layout import PageLayout

Axis = Literal["channel", "token"]
Rounding = Literal["even", "half_up"]
KOrV = Literal["k", "v"]
ElementType = Literal["uint8", "bfloat16", "row"]
"""Type of a page field's elements; "row" is the 16-bit type of the model's rows."""

MAX_PARTITION = 64

PAGE_SIZE = 64
"""Tokens per page: the quantization block, the radix-tree granule and the wire block."""

EXTRA_BITS = 2
"""Low-order bits of a code besides the coding's own: those that outlier channels have, and those
that nested codes drop."""

NESTED_STEPS = 1 << EXTRA_BITS
"""Steps in a cell of a nested code."""


def nested_margin(max_code: int) -> float:
    """Distance from the minimum to the middle of the lowest cell of nested codes, of the range.

    The range has a step less than all cells together: the outermost steps lie on its ends.
    """
    return 0.5 * (NESTED_STEPS - 1) / (NESTED_STEPS * (max_code + 1) - 1)


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
        nested: Codes are those of `EXTRA_BITS` more bits without the low-order ones, so that
            channels are read at the middles of cells of equal width. Not of outlier channels,
            which have those bits.
        outlier_16ths: K on the channel axis only: this many sixteenths of the channels, the
            leading ones, get `EXTRA_BITS` extra bits.
    """

    num_bits: int
    axis: Axis = "token"
    whole_head: bool = False
    rotated: bool = False
    rounding: Rounding = "even"
    nested: bool = False
    outlier_16ths: int = 0

    def __post_init__(self) -> None:
        if self.num_bits not in (2, 4, 8, 16):
            raise ValueError(f"num_bits: expected 2, 4, 8 or 16, got {self.num_bits}")
        if self.outlier_16ths and (self.axis != "channel" or self.num_bits not in (2, 4)):
            raise ValueError(
                f"outlier_16ths: expected 0 unless channels have scales and 2 or 4 bits, got "
                f"{self.outlier_16ths} with axis {self.axis} and {self.num_bits} bits"
            )
        if self.nested and (self.rounding != "even" or self.num_bits not in (2, 4)):
            raise ValueError(
                f"nested: expected False unless ties go to even and codes have 2 or 4 bits, got "
                f"True with rounding {self.rounding} and {self.num_bits} bits"
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


class FieldSpec(NamedTuple):
    """One field of one head inside a page, before it has a place.

    Attributes:
        name: Key in `PageLayout.fields`, "k_..." or "v_...".
        shape: Elements, row-major.
        element: Type of the elements.
    """

    name: str
    shape: tuple[int, ...]
    element: ElementType


class LayerBits(NamedTuple):
    """Bits of one layer's pages, where `python -m sgl_kvq calibrate` chooses them.

    Attributes:
        k: Bits of a key channel.
        outlier_16ths: Sixteenths of the key channels with `EXTRA_BITS` extra bits.
        v: Bits of a value channel.
    """

    k: int
    outlier_16ths: int
    v: int


@dataclass(frozen=True)
class CalibrationMethod:
    """How `python -m sgl_kvq calibrate` prepares a model for the formats that share this object.

    Heads are stored in a basis of their own, see `sgl_kvq.formats.calibration`; a file may also
    choose the bits of each layer.

    Args:
        allowed: Bits that a file may ask for.
        candidates: Bits that `--budget-bits` chooses from.
        with_bits: Makes the format with a name and bits.
    """

    allowed: tuple[LayerBits, ...]
    candidates: tuple[LayerBits, ...]
    with_bits: Callable[[str, LayerBits], QuantFormat]


@dataclass(frozen=True)
class QuantFormat(ABC):
    """A named way to store K and V in closed pages.

    A family of formats derives from it and says which fields a page has and how they are written
    and read; `sgl_kvq.formats.scalar` is the family of codes with one (scale, min) per group.

    Args:
        name: The value of `--kv-quant`.
        k: Coding of keys.
        v: Coding of values.
        help: What the format is, in one line.
        source: Where the mathematics comes from; the module says what differs.
        calibration: How it is calibrated; None stores heads as they are.
    """

    name: str
    k: Coding
    v: Coding
    help: str = field(compare=False)
    source: str = field(compare=False)
    calibration: CalibrationMethod | None = field(default=None, compare=False)

    @property
    def bits(self) -> LayerBits:
        """Bits from which `CalibrationMethod.with_bits` makes this format."""
        return LayerBits(self.k.num_bits, self.k.outlier_16ths, self.v.num_bits)

    @property
    def is_raw(self) -> bool:
        """Whether pages hold the rows as they are, in 16 bits."""
        return self.k.is_raw and self.v.is_raw

    @abstractmethod
    def fields(self, head_dim: int) -> list[FieldSpec]:
        """Fields of one head of a page, in the order they lie.

        Args:
            head_dim: Channels of a head.
        """

    @abstractmethod
    def quantize(
        self, k: torch.Tensor, v: torch.Tensor, num_sinks: torch.Tensor, layout: PageLayout
    ) -> torch.Tensor:
        """Quantize full pages. Callers use `sgl_kvq.formats.quantize.encode_pages`, which checks.

        Args:
            k: [N, PAGE_SIZE, num_kv_heads, head_dim] of `layout.row_dtype`.
            v: Like k.
            num_sinks: int32 [N], leading tokens of each page that are kept elsewhere.
            layout: Layout of this format.

        Returns:
            uint8 [N, page_bytes].
        """

    @abstractmethod
    def dequantize(self, pages: torch.Tensor, layout: PageLayout, tensor: KOrV) -> torch.Tensor:
        """Read K or V back, in the basis that the rows were given in.

        Args:
            pages: uint8 [N, page_bytes], contiguous.
            layout: Layout of this format.
            tensor: "k" or "v".

        Returns:
            float32 [N, num_kv_heads, PAGE_SIZE, head_dim].
        """
