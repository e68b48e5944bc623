"""Register a format of your own: 8 bits for keys, 4 bits for values.

    python examples/register_format.py

A server finds the formats of other packages by an entry point. In `pyproject.toml` of the package
that holds this module:

    [project.entry-points."sgl_kvq.formats"]
    k8v4 = "my_package.register_format"

`--kv-quant k8v4` then serves it; pool, kernels and transfer need no change.
"""

from __future__ import annotations

import torch

from sgl_kvq.formats.base import PAGE_SIZE, Coding
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.quantize import encode_pages
from sgl_kvq.formats.registry import get_format, register
from sgl_kvq.formats.scalar import ScalarFormat

HEADS, HEAD_DIM = 2, 128

register(
    ScalarFormat(
        name="k8v4",
        k=Coding(8, axis="channel"),
        v=Coding(4, axis="token"),
        help="keys in 8 bits per channel, values in 4 bits per token",
        source="examples/register_format.py",
    )
)


def main() -> None:
    """Print what pages of the new format and of its neighbours cost and lose."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, PAGE_SIZE, HEADS, HEAD_DIM).bfloat16()
    no_sinks = torch.zeros(1, dtype=torch.int32)
    for name in ("hack4", "k8v4", "hack8"):
        layout = PageLayout(get_format(name), HEAD_DIM, HEADS)
        pages = encode_pages(k, v, no_sinks, layout)
        errors = []
        for tensor, rows in (("k", k), ("v", v)):
            stored = layout.format.dequantize(pages, layout, tensor).double()
            exact = rows.double().transpose(1, 2)
            errors.append(float((stored - exact).norm() / exact.norm()))
        ratio = layout.row_page_bytes / layout.page_bytes
        print(f"{name:<5} {ratio:.2f}x bf16, error of K {errors[0]:.4f}, of V {errors[1]:.4f}")


if __name__ == "__main__":
    main()
