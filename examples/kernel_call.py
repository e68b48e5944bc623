"""Quantize two sequences into pages and attend to them once, in FlashInfer's terms.

On a GPU, or on a CPU under Triton's interpreter:

    python examples/kernel_call.py
    TRITON_INTERPRET=1 python examples/kernel_call.py
"""

from __future__ import annotations

import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.registry import get_format
from sgl_kvq.kernels.append.api import TouchedPages, append
from sgl_kvq.kernels.decode.api import DecodeWorkspace, decode
from sgl_kvq.memory_pool.storage import PagedCache, PageTable, sink_rows_of

HEADS, QUERIES_PER_HEAD, HEAD_DIM, SINK_TOKENS = 2, 4, 64, 4
SEQ_LENS = (130, 65)  # three pages, of which two are closed; two pages, of which one is closed
SM_SCALE = HEAD_DIM**-0.5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def ints(*values: int) -> torch.Tensor:
    """An int32 tensor."""
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def empty_cache(layout: PageLayout) -> PagedCache:
    """Storage of one layer: 7 page rows and 2 open slots, besides the padding entry 0."""
    pages = torch.zeros(8, layout.page_bytes, dtype=torch.uint8, device=DEVICE)
    shape = (3, 2, PAGE_SIZE, HEADS, HEAD_DIM)
    return PagedCache(
        pages=pages,
        open_rows=torch.zeros(shape, dtype=layout.row_dtype, device=DEVICE),
        sink_rows=sink_rows_of(pages, layout, SINK_TOKENS),
    )


def attention(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Store both sequences in a format and decode one query each.

    Args:
        name: Of the format.
        q: bfloat16 [2, HEADS * QUERIES_PER_HEAD, HEAD_DIM].
        k: bfloat16 [sum of SEQ_LENS, HEADS, HEAD_DIM], one sequence after the other.
        v: Like k.

    Returns:
        Like q.
    """
    layout = PageLayout(get_format(name), HEAD_DIM, HEADS)
    cache = empty_cache(layout)
    # Pages 4, 1 and 5 hold the first sequence, 2 and 3 the second. Full ones are quantized, the
    # last one of each sequence goes to an open slot: rows 128 and 129, and row 64. Page rows 6 and
    # 7 hold the sink rows of the two first pages.
    touched = TouchedPages(
        pages=ints(4, 1, 5, 2, 3),
        slots=ints(1, 1, 1, 2, 2),
        sink_pages=ints(6, 6, 6, 7, 7),
        prior=ints(0, 0, 0, 0, 0),
        first=ints(0, 0, 0, 0, 0),
        end=ints(64, 64, 2, 64, 1),
        start=ints(0, 64, 128, 130, 194),
        is_first=ints(1, 0, 0, 1, 0),
    )
    num_replaced = torch.zeros((), dtype=torch.int64, device=DEVICE)
    no_prior_rows = torch.empty_like(cache.open_rows[:1])
    append(cache, layout, k, v, touched, num_replaced, no_prior_rows)
    table = PageTable(
        kv_indptr=ints(0, 3, 5),
        kv_indices=ints(4, 1, 5, 2, 3),
        kv_last_page_len=ints(2, 1),
        open_slots=ints(1, 2),
        sink_pages=ints(6, 7),
    )
    workspace = DecodeWorkspace(len(q), q.shape[1], layout, DEVICE)
    out, _ = decode(q, cache, table, layout, SM_SCALE, workspace)
    return out


def exact_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same in float64 over the rows as they came."""
    outs = []
    for query, keys, values in zip(q, k.split(SEQ_LENS), v.split(SEQ_LENS), strict=True):
        grouped = query.double().view(HEADS, QUERIES_PER_HEAD, HEAD_DIM)
        scores = torch.einsum("hgd,thd->hgt", grouped, keys.double()) * SM_SCALE
        outs.append(torch.einsum("hgt,thd->hgd", scores.softmax(-1), values.double()).flatten(0, 1))
    return torch.stack(outs)


def main() -> dict[str, float]:
    """Print bytes per token and the error of each format; return the errors."""
    torch.manual_seed(0)
    q = torch.randn(2, HEADS * QUERIES_PER_HEAD, HEAD_DIM, device=DEVICE).bfloat16()
    # Channels have means of their own, as those of real keys and values.
    k, v = (
        torch.randn(2, sum(SEQ_LENS), HEADS, HEAD_DIM, device=DEVICE)
        + torch.randn(2, 1, HEADS, HEAD_DIM, device=DEVICE)
    ).bfloat16()
    exact = exact_attention(q, k, v)
    errors = {}
    for name in ("bf16", "hack4", "hack2"):
        out = attention(name, q, k, v)
        errors[name] = float((out.double() - exact).norm() / exact.norm())
        layout = PageLayout(get_format(name), HEAD_DIM, HEADS)
        print(f"{name:<6} {layout.bytes_per_token:6.1f} bytes/token, error {errors[name]:.4f}")
    return errors


if __name__ == "__main__":
    main()
