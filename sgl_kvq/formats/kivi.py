"""KIVI: keys per channel, values per token, dequantized in registers."""

from __future__ import annotations

from sgl_kvq.formats.base import Coding, QuantFormat


def _kivi(num_bits: int) -> QuantFormat:
    return QuantFormat(
        name=f"kivi{num_bits}",
        k=Coding(num_bits, axis="channel"),
        v=Coding(num_bits, axis="token"),
        source="KIVI (arXiv 2402.02750), section 3; group and residual are the page, for V too, "
        "and sink tokens stay in 16 bits",
    )


FORMATS = (_kivi(2), _kivi(4))
