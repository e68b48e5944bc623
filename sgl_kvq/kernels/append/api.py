"""Append on a GPU: the operation that callers use."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.kernels._page_spec import page_spec
from sgl_kvq.kernels.append.kernel import _append_fwd_kernel
from sgl_kvq.kernels.paged_cache import PagedCache


@dataclass(frozen=True)
class TouchedPages:
    """Pages that get rows in this step; every tensor is int32 [n].

    Args:
        pages: Where the bytes go if the page fills.
        slots: Open slot the rows go to (decode: always; extend: if the page stays open).
        sink_slots: Sink slot of the page; used by first pages that fill.
        prior: Index into the prior rows, where the page's earlier rows lie.
        first: First fresh row in the page; earlier ones come from the prior rows.
        end: One after the last fresh row; 64 fills the page.
        start: Row of k and v that becomes row `first`.
        is_first: 1 where the page holds position 0.
    """

    pages: torch.Tensor
    slots: torch.Tensor
    sink_slots: torch.Tensor
    prior: torch.Tensor
    first: torch.Tensor
    end: torch.Tensor
    start: torch.Tensor
    is_first: torch.Tensor


def append(
    cache: PagedCache,
    layout: PageLayout,
    k: torch.Tensor,
    v: torch.Tensor,
    touched: TouchedPages,
    num_contained: torch.Tensor,
    prior_rows: torch.Tensor | None = None,
) -> None:
    """Store fresh rows and quantize the pages they fill, in one launch.

    Which pages fill is read on the device, so a CUDA graph may replay the call with new metadata.

    Args:
        cache: Written in place.
        layout: Of the pages.
        k: [tokens, num_kv_heads, head_dim] of `layout.row_dtype` after RoPE, channels contiguous.
        v: Like k.
        touched: Pages that get rows, each once.
        num_contained: int64 scalar, raised by the non-finite or too large elements replaced.
        prior_rows: [m, 2, 64, num_kv_heads, head_dim], earlier rows of pages written before. None:
            they are read from the open slots, and a page that fills keeps its rows there too
            (decode).

    Raises:
        ValueError: wrong dtype or stride.
    """
    for name, rows in (("k", k), ("v", v)):
        if rows.dtype != layout.row_dtype or rows.stride(2) != 1:
            raise ValueError(
                f"{name}: expected {layout.row_dtype} with contiguous channels, got {rows.dtype} "
                f"with stride {rows.stride(2)}"
            )
    keep = prior_rows is None
    grid = (len(touched.pages), layout.num_kv_heads, 2)
    _append_fwd_kernel[grid](
        k, v, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        touched.pages, touched.slots, touched.sink_slots, touched.prior, touched.first,
        touched.end, touched.start, touched.is_first,
        cache.pages, cache.open_rows, cache.open_rows if prior_rows is None else prior_rows,
        cache.sink_rows, num_contained,
        SINKS=cache.sink_tokens, KEEP=keep, SPEC=page_spec(layout),
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
