"""The numbers of a page layout as one compile-time constant of kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from sgl_kvq.formats.base import EXTRA_BITS, Coding, nested_margin
from sgl_kvq.formats.page_layout import PageLayout


@dataclass(frozen=True)
class CodingSpec:
    """K or V of a page. Offsets count bytes from the start of a head's slice.

    Args:
        num_bits: Bits of a code; 16 means rows of 16 bits and nothing else.
        per_channel: Scales run along the channels (one a channel) instead of the tokens.
        group_channels: Channels that share a scale (token axis); head_dim on the channel axis.
        half_up: Ties round up instead of to even.
        rotation: Order of the Hadamard blocks, 1 without rotation.
        margin: Of nested codes, the distance from the minimum to the middle of the lowest cell, as
            a share of the range; 0 of others.
        extra_bytes: Bytes of a token's extra bits of outlier channels, 0 without.
        codes, scales, mins, extra: Offsets; 0 where the field does not exist.
    """

    num_bits: int
    per_channel: bool
    group_channels: int
    half_up: bool
    rotation: int
    margin: float
    extra_bytes: int
    codes: int
    scales: int
    mins: int
    extra: int

    @property
    def is_raw(self) -> bool:
        """Whether the page holds 16-bit rows."""
        return self.num_bits == 16

    @property
    def nested(self) -> bool:
        """Whether codes are those of `EXTRA_BITS` more bits without the low-order ones."""
        return self.margin > 0


@dataclass(frozen=True)
class PageSpec:
    """Everything about pages that a kernel needs while it is compiled.

    Triton keys its cache with the text of this object, so each number that code depends on must be
    a field of it.

    Args:
        head_dim: Channels of a head.
        num_kv_heads: Heads of this rank.
        head_bytes: Bytes of one head's slice of a page row.
        page_bytes: Bytes of a page row.
        k: Keys.
        v: Values.
    """

    head_dim: int
    num_kv_heads: int
    head_bytes: int
    page_bytes: int
    k: CodingSpec
    v: CodingSpec


@lru_cache(maxsize=64)
def page_spec(layout: PageLayout) -> PageSpec:
    """Numbers of a layout for the kernels."""
    return PageSpec(
        head_dim=layout.head_dim,
        num_kv_heads=layout.num_kv_heads,
        head_bytes=layout.head_bytes,
        page_bytes=layout.page_bytes,
        k=_coding_spec(layout, "k", layout.format.k),
        v=_coding_spec(layout, "v", layout.format.v),
    )


def _coding_spec(layout: PageLayout, name: str, coding: Coding) -> CodingSpec:
    def offset(field: str) -> int:
        known = layout.fields.get(f"{name}_{field}")
        return known.offset_bytes if known else 0

    per_channel = coding.axis == "channel"
    groups = 1 if per_channel or coding.is_raw else coding.num_groups(layout.head_dim)
    return CodingSpec(
        num_bits=coding.num_bits,
        per_channel=per_channel,
        group_channels=layout.head_dim // groups,
        half_up=coding.rounding == "half_up",
        rotation=layout.rotation_order if coding.rotated else 1,
        margin=nested_margin(coding.max_code) if coding.nested else 0.0,
        extra_bytes=coding.num_outliers(layout.head_dim) * EXTRA_BITS // 8,
        codes=offset("codes"),
        scales=offset("scales"),
        mins=offset("mins"),
        extra=offset("extra"),
    )
