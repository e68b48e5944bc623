"""KIVI: keys per channel, values per token.

Source: KIVI (arXiv 2402.02750), section 3. Group and residual are the page here, for V too, and
sink tokens stay in 16 bits.
"""

from __future__ import annotations

from sgl_kvq.formats.base import Coding
from sgl_kvq.formats.registry import register
from sgl_kvq.formats.scalar import ScalarFormat

for _bits in (2, 4):
    register(
        ScalarFormat(
            name=f"kivi{_bits}",
            k=Coding(_bits, axis="channel"),
            v=Coding(_bits, axis="token"),
            help=f"KIVI, {_bits} bits: keys per channel, values per token",
            source="KIVI (arXiv 2402.02750)",
        )
    )
