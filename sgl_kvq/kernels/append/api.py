"""Append on a GPU: the operation that callers use."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.kernels.append.kernel import _append_fwd_kernel, _close_fwd_kernel
from sgl_kvq.kernels.append.touched import TouchedPages
from sgl_kvq.kernels.common.page_spec import page_spec
from sgl_kvq.memory_pool.storage import PagedCache, PageTable

CLOSE_PROGRAMS = 1024  # of eight warps; more than run at once on any GPU


class PagedLayers:
    """Storage of several layers, for one launch over all of them.

    Args:
        caches: Of equal shapes, on one device. They must stay where they are.
    """

    def __init__(self, caches: Sequence[PagedCache]) -> None:
        def storage(cache: PagedCache) -> tuple[torch.Tensor, ...]:
            return cache.pages, cache.open_rows, cache.sink_rows

        self.first = caches[0]
        displacements = [
            [
                (tensor.data_ptr() - first.data_ptr()) // first.element_size()
                for tensor, first in zip(storage(cache), storage(self.first), strict=True)
            ]
            for cache in caches
        ]
        # int64 [3, layers], in elements: how far each tensor lies from the first layer's.
        self.displacements = torch.tensor(displacements).T.contiguous().to(self.first.pages.device)


def append(
    cache: PagedCache,
    layout: PageLayout,
    k: torch.Tensor,
    v: torch.Tensor,
    touched: TouchedPages,
    num_nonfinite: torch.Tensor,
    prior_rows: torch.Tensor,
) -> None:
    """Store the fresh rows of an extend step and quantize the pages they fill, in one launch.

    Args:
        cache: Written in place.
        layout: Of the pages.
        k: [tokens, num_kv_heads, head_dim] of `layout.row_dtype` after RoPE, channels contiguous.
        v: Like k.
        touched: Pages that get rows, each once.
        num_nonfinite: int64 scalar, raised by the non-finite or too large elements replaced.
        prior_rows: [m, 2, 64, num_kv_heads, head_dim], earlier rows of pages written before.

    Raises:
        ValueError: wrong dtype or stride.
    """
    for name, rows in (("k", k), ("v", v)):
        if rows.dtype != layout.row_dtype or rows.stride(2) != 1:
            raise ValueError(
                f"{name}: expected {layout.row_dtype} with contiguous channels, got {rows.dtype} "
                f"with stride {rows.stride(2)}"
            )
    grid = (len(touched.pages), layout.num_kv_heads, 2)
    _append_fwd_kernel[grid](
        k, v, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        touched.pages, touched.slots, touched.sink_pages, touched.prior, touched.first,
        touched.end, touched.start, touched.is_first,
        cache.pages, cache.open_rows, prior_rows, cache.sink_rows, num_nonfinite,
        SINKS=cache.sink_tokens, SPEC=page_spec(layout),
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


def close_pages(
    layers: PagedLayers, layout: PageLayout, table: PageTable, num_nonfinite: torch.Tensor
) -> None:
    """Quantize each full last page of a decode step, in all layers, in one launch.

    Attention reads a request's last page from its open slot, so nobody needs the codes before the
    next step: one launch after the last layer does for all of them. Which pages are full is read on
    the device, so a CUDA graph may replay the call with a new table.

    Args:
        layers: Pages and sink rows are written in place; all 64 rows lie in the open slots.
        layout: Of the pages.
        table: Of the step.
        num_nonfinite: int64 scalar, raised by the non-finite or too large elements replaced.
    """
    batch, cache = len(table.kv_last_page_len), layers.first
    num_layers = layers.displacements.shape[1]
    pieces = batch * num_layers * layout.num_kv_heads * 2
    _close_fwd_kernel[(min(CLOSE_PROGRAMS, pieces),)](
        layers.displacements, cache.pages, cache.open_rows, cache.sink_rows,
        table.kv_indptr, table.kv_indices, table.kv_last_page_len, table.open_slots,
        table.sink_pages, num_nonfinite, batch, num_layers,
        SINKS=cache.sink_tokens, SPEC=page_spec(layout),
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
