"""Write fresh rows and close the pages they fill, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.quantize import encode_pages, replace_nonfinite
from sgl_kvq.kernels.append.touched import TouchedPages
from sgl_kvq.memory_pool.storage import PagedCache, PageTable


@dataclass(frozen=True)
class ClosingPages:
    """Pages whose 64th token this step writes.

    Args:
        rows: int64 [n], where their rows lie: an open slot (decode) or a touched page (extend).
        pages: int64 [n], where their bytes go.
        first: int64 [m], which of the n hold position 0.
        sink_pages: int64 [m], where the sink rows of those go.
    """

    rows: torch.Tensor
    pages: torch.Tensor
    first: torch.Tensor
    sink_pages: torch.Tensor


@dataclass(frozen=True)
class DecodeAppend:
    """One fresh row a request.

    Args:
        k_rows: int64 [batch], rows of `open_rows`, counted over slots, that take K.
        v_rows: int64 [batch], likewise V.
        closing: Pages that this row fills.
    """

    k_rows: torch.Tensor
    v_rows: torch.Tensor
    closing: ClosingPages


@dataclass(frozen=True)
class ExtendAppend:
    """Fresh rows of an extend batch, gathered by the pages they touch.

    Args:
        num_touched: Pages of the batch that get at least one row.
        touched: int64 [tokens], which of them a token goes to.
        offsets: int64 [tokens], row inside the page.
        resumed: int64 [r], touched pages that hold rows of earlier steps.
        resumed_slots: int64 [r], where those rows lie.
        kept_open: int64 [o], touched pages that stay open.
        kept_slots: int64 [o], where their rows go.
        closing: Pages that fill, `rows` counting touched pages.
    """

    num_touched: int
    touched: torch.Tensor
    offsets: torch.Tensor
    resumed: torch.Tensor
    resumed_slots: torch.Tensor
    kept_open: torch.Tensor
    kept_slots: torch.Tensor
    closing: ClosingPages


def plan_append_decode(table: PageTable) -> DecodeAppend:
    """Prepare what all layers share in a decode step.

    Args:
        table: The batch, its newest rows counted.
    """
    num_pages = table.kv_indptr.diff()
    offsets = table.kv_last_page_len.long() - 1
    slots = table.open_slots.long()
    closes = (table.kv_last_page_len == PAGE_SIZE).nonzero().squeeze(1)
    first = (num_pages[closes] == 1).nonzero().squeeze(1)
    last_pages = table.kv_indices[table.kv_indptr[1:].long()[closes] - 1]
    k_rows = slots * 2 * PAGE_SIZE + offsets
    return DecodeAppend(
        k_rows=k_rows,
        v_rows=k_rows + PAGE_SIZE,
        closing=ClosingPages(
            rows=slots[closes],
            pages=last_pages.long(),
            first=first,
            sink_pages=table.sink_pages.long()[closes][first],
        ),
    )


def plan_append_extend(touched: TouchedPages, resumed_slots: torch.Tensor) -> ExtendAppend:
    """Prepare what all layers share in an extend step.

    Args:
        touched: Pages that get rows, requests one after the other.
        resumed_slots: int [r], open slots with the earlier rows of resumed pages, in order.
    """
    page = torch.arange(len(touched.pages), device=touched.pages.device)
    page_of = page.repeat_interleave(touched.end - touched.first)
    shift = touched.first.long() - touched.start  # row in the page less row of k
    offsets = torch.arange(len(page_of), device=page.device) + shift[page_of]
    fills = touched.end == PAGE_SIZE
    is_first = touched.is_first[fills] == 1
    return ExtendAppend(
        num_touched=len(page),
        touched=page_of,
        offsets=offsets,
        resumed=page[touched.first > 0],
        resumed_slots=resumed_slots.long(),
        kept_open=page[~fills],
        kept_slots=touched.slots[~fills].long(),
        closing=ClosingPages(
            rows=page[fills],
            pages=touched.pages[fills].long(),
            first=is_first.nonzero().squeeze(1),
            sink_pages=touched.sink_pages[fills][is_first].long(),
        ),
    )


def append_decode(
    cache: PagedCache, layout: PageLayout, k: torch.Tensor, v: torch.Tensor, plan: DecodeAppend
) -> torch.Tensor:
    """Store one row a request; quantize the pages it fills.

    Args:
        cache: Written in place. The rows of a page that closes stay in its slot.
        layout: Of the pages.
        k: [batch, num_kv_heads, head_dim], after RoPE.
        v: Like k.
        plan: Where they go.

    Returns:
        int64 scalar, non-finite elements that were replaced in closed pages.
    """
    rows = cache.open_rows.view(-1, layout.num_kv_heads, layout.head_dim)
    rows.index_copy_(0, plan.k_rows, k.to(layout.row_dtype))
    rows.index_copy_(0, plan.v_rows, v.to(layout.row_dtype))
    return _close_pages(cache, layout, cache.open_rows, plan.closing)


def append_extend(
    cache: PagedCache, layout: PageLayout, k: torch.Tensor, v: torch.Tensor, plan: ExtendAppend
) -> tuple[torch.Tensor, torch.Tensor]:
    """Store the rows of an extend batch; quantize the pages they fill.

    Args:
        cache: Written in place.
        layout: Of the pages.
        k: [tokens, num_kv_heads, head_dim], after RoPE.
        v: Like k.
        plan: Where they go.

    Returns:
        touched rows [num_touched, 2, PAGE_SIZE, num_kv_heads, head_dim], undefined beyond the last
        token of a request; int64 scalar, non-finite elements that were replaced in closed pages.
    """
    shape = (plan.num_touched, *cache.open_rows.shape[1:])
    touched_rows = cache.open_rows.new_empty(shape)
    touched_rows[plan.resumed] = cache.open_rows[plan.resumed_slots]
    touched_rows[plan.touched, 0, plan.offsets] = k.to(layout.row_dtype)
    touched_rows[plan.touched, 1, plan.offsets] = v.to(layout.row_dtype)
    cache.open_rows[plan.kept_slots] = touched_rows[plan.kept_open]
    return touched_rows, _close_pages(cache, layout, touched_rows, plan.closing)


def _close_pages(
    cache: PagedCache, layout: PageLayout, source: torch.Tensor, closing: ClosingPages
) -> torch.Tensor:
    """Quantize full pages found in `source` [n, 2, PAGE_SIZE, H, D]; return replaced elements."""
    if len(closing.pages) == 0:
        return torch.zeros((), dtype=torch.int64, device=source.device)
    rows, num_nonfinite = replace_nonfinite(source[closing.rows])
    num_sinks = torch.zeros(len(rows), dtype=torch.int32, device=source.device)
    num_sinks[closing.first] = cache.sink_tokens
    k, v = rows.unbind(1)
    cache.pages[closing.pages] = encode_pages(k, v, num_sinks, layout)
    cache.sink_rows[closing.sink_pages] = rows[closing.first, :, : cache.sink_tokens]
    return num_nonfinite
