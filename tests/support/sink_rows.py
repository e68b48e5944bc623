"""Sink rows for stores without an allocator."""

from __future__ import annotations

import torch

from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.memory_pool.storage import sink_rows_of
from sgl_kvq.memory_pool.store import PagedStore


def give_sink_rows(store: PagedStore, first_page: torch.Tensor) -> int:
    """Give a first page (int64 [1]) one of the page rows set apart for sink rows.

    Returns:
        The row.
    """
    plan = store.plan
    used = set(store.sink_pages.step_view().tolist())
    row = next(row for row in range(plan.num_pages + 1, plan.num_rows + 1) if row not in used)
    store.sink_pages.attach(first_page.to(store.device), torch.tensor([row], device=store.device))
    return row


def empty_sink_rows(
    layout: PageLayout, num_rows: int, sink_tokens: int, device: str
) -> torch.Tensor:
    """Sink rows of a cache without a store, every element NaN."""
    rows = torch.full((num_rows, layout.page_bytes), 0xFF, dtype=torch.uint8, device=device)
    return sink_rows_of(rows, layout, sink_tokens)


def take_back(store: PagedStore, pages: torch.Tensor) -> None:
    """Take the slots and sink rows of these pages (int64 [n]) back."""
    store.open_slots.release(pages)
    store.sink_pages.detach(pages)
    store.sink_pages.reclaim()
