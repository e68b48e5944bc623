"""Draw `docs/kv_layout.svg` and print the tables of `docs/kv_layout.md` from the real layout.

Usage: python scripts/draw_kv_layout.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from tabulate import tabulate

from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.registry import format_names, get_format

HEAD_DIMS = (64, 80, 96, 128, 256)
SHOWN = ("hack2", "kvq2", "hack4", "kvq4", "saw4")
COLORS = {
    "codes": "#4878a8",
    "scales": "#e0913f",
    "mins": "#c8b45a",
    "extra": "#6a51a3",
}


def bytes_table() -> str:
    """Bytes per token of a closed page, layer and KV head, and how many times that fits in bf16."""
    rows = []
    for name in format_names():
        cells = []
        for head_dim in HEAD_DIMS:
            layout = PageLayout(get_format(name), head_dim, 1)
            gain = layout.row_page_bytes / layout.page_bytes
            cells.append(f"{layout.bytes_per_token:g} ({gain:.2f}x)")
        rows.append([f"`{name}`", *cells])
    return str(tabulate(rows, ["format", *map(str, HEAD_DIMS)], tablefmt="github"))


def field_table(name: str, head_dim: int) -> str:
    """Offsets of one head's fields."""
    layout = PageLayout(get_format(name), head_dim, 1)
    rows = [
        [f"`{key}`", f.offset_bytes, f.size_bytes, str(f.dtype)[6:], str(list(f.shape))]
        for key, f in layout.fields.items()
    ]
    return str(tabulate(rows, ["field", "offset", "bytes", "type", "shape"], tablefmt="github"))


def draw(path: Path, head_dim: int = 128) -> None:
    """One head slice of a page row a format, to scale, against the same tokens in bf16."""
    figure, axes = plt.subplots(figsize=(10, 3.2))
    for y, name in enumerate(SHOWN):
        layout = PageLayout(get_format(name), head_dim, 1)
        for key, field in layout.fields.items():
            tensor, kind = key.split("_")
            axes.barh(
                y, field.size_bytes, left=field.offset_bytes, color=COLORS[kind],
                edgecolor="white", hatch="//" if tensor == "v" else None, linewidth=0.5,
            )  # fmt: skip
            if kind == "codes":
                middle = field.offset_bytes + field.size_bytes / 2
                axes.text(middle, y, key, ha="center", va="center", color="white", fontsize=8)
        axes.text(
            layout.head_bytes + 60, y, f"{layout.head_bytes:,} bytes", va="center", fontsize=8
        )
    bf16 = PageLayout(get_format("bf16"), head_dim, 1).head_bytes
    axes.set_yticks(range(len(SHOWN)), SHOWN)
    axes.invert_yaxis()
    axes.set_xlabel(
        f"byte of a head slice: 64 tokens, head_dim {head_dim} (bf16: {bf16:,} bytes); "
        "plain K, hatched V"
    )
    axes.legend(
        [plt.Rectangle((0, 0), 1, 1, color=c) for c in COLORS.values()], COLORS, ncols=4,
        loc="upper center", bbox_to_anchor=(0.5, 1.2), frameon=False,
    )  # fmt: skip
    axes.set_xlim(0, 11_500)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(Path("docs/kv_layout.svg"))
    print(bytes_table(), field_table("hack2", 128), field_table("saw4", 64), sep="\n\n")
