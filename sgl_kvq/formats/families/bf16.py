"""No quantization: pages of 16-bit rows. Answers must equal SGLang's without this plugin."""

from __future__ import annotations

from sgl_kvq.formats.base import Coding
from sgl_kvq.formats.registry import register
from sgl_kvq.formats.scalar import ScalarFormat

register(
    ScalarFormat(
        name="bf16",
        k=Coding(16),
        v=Coding(16),
        help="the same pages with 16-bit rows",
        source="control",
    )
)
