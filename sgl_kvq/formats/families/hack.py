"""HACK: keys per channel, values per token; attention multiplies the codes themselves.

Source: HACK (arXiv 2502.03589), in the form of its ATC '26 code: K per channel over a block of
tokens, V per token. Blocks count from position 0 here, so that a block is a page. Pages hold no
sums of codes, which HACK caches for 8-bit queries and 16-bit queries do not need. hack2-v1 has the
axes of arXiv v1 (section 4), with nearest instead of stochastic rounding.
"""

from __future__ import annotations

from sgl_kvq.formats.base import Coding
from sgl_kvq.formats.registry import register
from sgl_kvq.formats.scalar import ScalarFormat

for _name, _k_bits, _v_bits in (("hack2", 2, 2), ("hack4", 4, 4), ("hack8", 8, 8), ("k4v2", 4, 2)):
    register(
        ScalarFormat(
            name=_name,
            k=Coding(_k_bits, axis="channel"),
            v=Coding(_v_bits, axis="token"),
            help=f"HACK, {_k_bits}-bit keys per channel, {_v_bits}-bit values per token",
            source="HACK (arXiv 2502.03589), ATC '26 form",
        )
    )

register(
    ScalarFormat(
        name="hack2-v1",
        k=Coding(2, axis="token"),
        v=Coding(2, axis="channel"),
        help="axes of HACK's arXiv v1, 2 bits, for comparison",
        source="HACK (arXiv 2502.03589v1)",
    )
)
