"""Our own formats: bits where they matter, in a basis that says where that is."""

from __future__ import annotations

from sgl_kvq.formats.base import Coding, QuantFormat


def kvq_format(name: str, k_bits: int, outlier_16ths: int, v_bits: int) -> QuantFormat:
    """A member of the family. Only 2-bit codes gain by ranges that cut outliers off.

    Args:
        name: The value of `--kv-quant`.
        k_bits: Of a key channel, 2 or 4.
        outlier_16ths: Sixteenths of the key channels with extra bits.
        v_bits: Of a value channel, 2 or 4.
    """
    return QuantFormat(
        name=name,
        k=Coding(k_bits, axis="channel", mse_clipping=k_bits == 2, outlier_16ths=outlier_16ths),
        v=Coding(v_bits, axis="token", whole_head=True, mse_clipping=v_bits == 2),
        source="axes of KIVI (arXiv 2402.02750); calibrated bases as in OSCAR (arXiv 2605.17757), "
        "but with K's channels in order of what an error in them costs, so that a fixed share of "
        "them can have two bits more, and with scales by squared error",
        own_basis=True,
    )


FORMATS = (kvq_format("kvq2", 2, 6, 2), kvq_format("kvq4", 4, 1, 4))
