"""The family of scalar formats: codes, and one (scale, min) per group of channels or tokens.

torch is imported only when pages are written or read, so that names are looked up without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import override

from sgl_kvq.formats.base import EXTRA_BITS, PAGE_SIZE, Coding, FieldSpec, KOrV, QuantFormat

if TYPE_CHECKING:
    import torch

    from sgl_kvq.formats.page_layout import PageLayout


@dataclass(frozen=True)
class ScalarFormat(QuantFormat):
    """A format whose values are code * scale + min; see `QuantFormat` for the arguments.

    Raises:
        ValueError: codings that no decode kernel reads together: values rotated or with outlier
            channels, or 16-bit rows of only one of K and V.
    """

    def __post_init__(self) -> None:
        if self.v.rotated or self.v.outlier_16ths:
            raise ValueError(
                f"v: expected values neither rotated nor with outlier channels, got {self.v}"
            )
        if self.k.is_raw != self.v.is_raw:
            raise ValueError(
                f"k, v: expected 16 bits in both or in neither, got {self.k.num_bits} and "
                f"{self.v.num_bits}"
            )

    @override
    def fields(self, head_dim: int) -> list[FieldSpec]:
        return [*_coding_fields("k", self.k, head_dim), *_coding_fields("v", self.v, head_dim)]

    @override
    def quantize(
        self, k: torch.Tensor, v: torch.Tensor, num_sinks: torch.Tensor, layout: PageLayout
    ) -> torch.Tensor:
        from sgl_kvq.formats.quantize import quantize_pages

        return quantize_pages(k, v, num_sinks, layout)

    @override
    def dequantize(self, pages: torch.Tensor, layout: PageLayout, tensor: KOrV) -> torch.Tensor:
        from sgl_kvq.formats.dequantize import dequantize_pages

        return dequantize_pages(pages, layout, tensor)


def _coding_fields(tensor: KOrV, coding: Coding, head_dim: int) -> list[FieldSpec]:
    """Fields of K or V. Minima lie right behind the scales, so that one read takes both."""
    if coding.is_raw:
        return [FieldSpec(f"{tensor}_codes", (PAGE_SIZE, head_dim), "row")]
    width = head_dim // coding.num_planes
    codes = (PAGE_SIZE, width) if tensor == "k" else (width, PAGE_SIZE)
    groups = coding.num_groups(head_dim)
    meta = (groups,) if coding.axis == "channel" else (groups, PAGE_SIZE)
    fields = [
        FieldSpec(f"{tensor}_codes", codes, "uint8"),
        FieldSpec(f"{tensor}_scales", meta, "bfloat16"),
        FieldSpec(f"{tensor}_mins", meta, "bfloat16"),
    ]
    if outliers := coding.num_outliers(head_dim):
        extra = (PAGE_SIZE, outliers * EXTRA_BITS // 8)
        fields.append(FieldSpec(f"{tensor}_extra", extra, "uint8"))
    return fields
