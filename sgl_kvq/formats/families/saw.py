"""SAW-INT4 (token-wise INT4 behind a Hadamard rotation of the keys) and the same without rotation.

Source: togethercomputer/saw-int4, block-diagonal rotation of K. Here (scale, min) are bfloat16, and
codes are made against the stored pair.
"""

from __future__ import annotations

from sgl_kvq.formats.base import Coding
from sgl_kvq.formats.registry import register
from sgl_kvq.formats.scalar import ScalarFormat


def _token_wise(rotated: bool) -> Coding:
    return Coding(4, axis="token", whole_head=True, rotated=rotated, rounding="half_up")


register(
    ScalarFormat(
        name="saw4",
        k=_token_wise(rotated=True),
        v=_token_wise(rotated=False),
        help="SAW-INT4, 4 bits per token, keys rotated by a Hadamard matrix",
        source="SAW-INT4 (togethercomputer/saw-int4)",
    )
)
register(
    ScalarFormat(
        name="int4",
        k=_token_wise(rotated=False),
        v=_token_wise(rotated=False),
        help="saw4 without the rotation",
        source="baseline of saw4",
    )
)
