"""Our own formats: bits where they matter, in a basis that says where that is."""

from __future__ import annotations

from sgl_kvq.formats.base import Coding, QuantFormat


def _kvq(num_bits: int, boosted_16ths: int) -> QuantFormat:
    return QuantFormat(
        name=f"kvq{num_bits}",
        k=Coding(num_bits, axis="channel", fitted=True, boosted_16ths=boosted_16ths),
        v=Coding(num_bits, axis="token", whole_head=True, fitted=True),
        arithmetic="dequantize",
        source="axes of KIVI (arXiv 2402.02750); calibrated bases as in OSCAR (arXiv 2605.17757), "
        "but with K's channels in order of what an error in them costs, so that a fixed share of "
        "them can have two bits more, and with scales by squared error",
        own_basis=True,
    )


FORMATS = (_kvq(2, boosted_16ths=6), _kvq(4, boosted_16ths=1))
