"""What the attention operations read: one layer's storage and a batch's page table."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgl_kvq.formats.base import PAGE_SIZE


@dataclass(frozen=True)
class PagedCache:
    """Storage of one layer. Page, open slot and sink slot 0 are padding: written, never read.

    Args:
        pages: uint8 [num_pages, page_bytes], closed pages.
        open_rows: [num_open_slots, 2, PAGE_SIZE, num_kv_heads, head_dim], K and V rows of pages
            that are still written. A slot keeps its rows until its next owner writes.
        sink_rows: [num_sink_slots, 2, sink_tokens, num_kv_heads, head_dim], the leading rows of
            closed first pages.
    """

    pages: torch.Tensor
    open_rows: torch.Tensor
    sink_rows: torch.Tensor

    @property
    def sink_tokens(self) -> int:
        """Leading tokens of a sequence that stay in 16 bits."""
        return int(self.sink_rows.shape[2])


@dataclass(frozen=True)
class SlotMaps:
    """Which slot a page's 16-bit rows lie in; int64 [num_pages] each, 0 (padding) without one.

    Args:
        open_slot_of: Open slot of a page; the last one after it closed.
        sink_slot_of: Sink slot of a page that holds position 0.
    """

    open_slot_of: torch.Tensor
    sink_slot_of: torch.Tensor


@dataclass(frozen=True)
class PageTable:
    """Pages of a batch in FlashInfer's terms, page size 64; the last page counts as open.

    A request's last page is read from its open slot even when it is full: its rows are exact there
    until the next page begins.

    Args:
        kv_indptr: int32 [batch + 1], where each request's pages begin in `kv_indices`.
        kv_indices: int32 [total pages], pages in order of position.
        kv_last_page_len: int32 [batch], rows in the last page, 1 to 64.
        open_slots: int32 [batch], the slot with the last page's rows.
        sink_slots: int32 [batch], the slot with the first page's sink rows; read only when the
            first page is closed.
    """

    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    kv_last_page_len: torch.Tensor
    open_slots: torch.Tensor
    sink_slots: torch.Tensor


def num_pages_of(seq_lens: torch.Tensor) -> torch.Tensor:
    """Pages that hold `seq_lens` tokens."""
    return (seq_lens + PAGE_SIZE - 1) // PAGE_SIZE
