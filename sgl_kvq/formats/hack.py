"""HACK: keys per channel, values per token; codes are multiplied never dequantized to memory."""

from __future__ import annotations

from sgl_kvq.formats.base import Coding, QuantFormat

_SOURCE = (
    "HACK (arXiv 2502.03589), in the form of its ATC '26 code: K per channel over the page, V per "
    "token; blocks here count from position 0, so that a block is a page; without its cached code "
    "sums, which float16 queries do not need"
)


def _hack(name: str, k_bits: int, v_bits: int) -> QuantFormat:
    return QuantFormat(
        name=name,
        k=Coding(k_bits, axis="channel"),
        v=Coding(v_bits, axis="token"),
        source=_SOURCE,
    )


FORMATS = (
    _hack("hack2", 2, 2),
    _hack("hack4", 4, 4),
    _hack("hack8", 8, 8),
    _hack("k4v2", 4, 2),
    QuantFormat(
        name="hack2-v1",
        k=Coding(2, axis="token"),
        v=Coding(2, axis="channel"),
        source="HACK, arXiv 2502.03589v1, section 4 (axes of v1, nearest instead of stochastic "
        "rounding); for comparison",
    ),
)
