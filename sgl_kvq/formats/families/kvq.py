"""Our own formats: bits where they matter, in a calibrated basis that says where that is.

Source: axes of KIVI (arXiv 2402.02750), calibrated bases as in OSCAR (arXiv 2605.17757). Here K's
channels are in order of what an error in them costs, so that a fixed share of them can have two
bits more, and 2-bit codes are read at the middles of cells of equal width.
"""

from __future__ import annotations

from itertools import product

from sgl_kvq.formats.base import CalibrationMethod, Coding, LayerBits, QuantFormat
from sgl_kvq.formats.registry import register
from sgl_kvq.formats.scalar import ScalarFormat


def kvq_format(name: str, k_bits: int, outlier_16ths: int, v_bits: int) -> QuantFormat:
    """Make a member of the family. Codes of 2 bits are those of 4 without the low-order bits.

    Args:
        name: The value of `--kv-quant`.
        k_bits: Bits of a key channel, 2 or 4.
        outlier_16ths: Sixteenths of the key channels with extra bits.
        v_bits: Bits of a value channel, 2 or 4.
    """
    return ScalarFormat(
        name=name,
        k=Coding(k_bits, axis="channel", nested=k_bits == 2, outlier_16ths=outlier_16ths),
        v=Coding(v_bits, axis="token", whole_head=True, nested=v_bits == 2),
        help=f"{k_bits}-bit keys and {v_bits}-bit values in a calibrated basis, nearest to bf16",
        source="ours, docs/fidelity.md",
        calibration=CALIBRATION,
    )


CALIBRATION = CalibrationMethod(
    allowed=tuple(LayerBits(*bits) for bits in product((2, 4), range(17), (2, 4))),
    candidates=tuple(LayerBits(*bits) for bits in product((2, 4), range(9), (2, 4))),
    with_bits=lambda name, bits: kvq_format(name, *bits),
)

register(kvq_format("kvq2", 2, 6, 2))
register(kvq_format("kvq4", 4, 1, 4))
