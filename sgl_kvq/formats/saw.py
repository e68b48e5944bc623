"""SAW-INT4 (token-wise INT4 behind a Hadamard rotation) and the same without rotation."""

from __future__ import annotations

from sgl_kvq.formats.base import Coding, QuantFormat


def _token_wise(rotated: bool) -> Coding:
    return Coding(4, axis="token", whole_head=True, rotated=rotated, rounding="half_up")


FORMATS = (
    QuantFormat(
        name="saw4",
        k=_token_wise(rotated=True),
        v=_token_wise(rotated=False),
        source="SAW-INT4 block-diagonal rotation of K (togethercomputer/saw-int4); (scale, min) in "
        "bfloat16, codes made against the stored values",
    ),
    QuantFormat(
        name="int4",
        k=_token_wise(rotated=False),
        v=_token_wise(rotated=False),
        source="token-wise INT4, the baseline that shows what the rotation buys",
    ),
)
