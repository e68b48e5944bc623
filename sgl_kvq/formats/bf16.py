"""No quantization: the page machinery with 16-bit rows, the control of every comparison."""

from __future__ import annotations

from sgl_kvq.formats.base import Coding, QuantFormat

FORMATS = (
    QuantFormat(
        name="bf16",
        k=Coding(16),
        v=Coding(16),
        source="control: must equal SGLang without this plugin",
    ),
)
