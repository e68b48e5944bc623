"""What the attention operations read: one layer's storage and a batch's page table."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.page_layout import PageLayout


@dataclass(frozen=True)
class PagedCache:
    """Storage of one layer. Page row and open slot 0 are padding: written, never read.

    Args:
        pages: uint8 [num_rows, page_bytes], closed pages, and the sink rows of first pages.
        open_rows: [num_open_slots, 2, PAGE_SIZE, num_kv_heads, head_dim], K and V rows of pages
            that are still written. A slot keeps its rows until its next owner writes.
        sink_rows: [num_rows, 2, sink_tokens, num_kv_heads, head_dim], the leading rows of closed
            first pages: page rows read in 16 bits, see `sink_rows_of`.

    Raises:
        ValueError: the sink rows do not lie as far apart as page rows do.
    """

    pages: torch.Tensor
    open_rows: torch.Tensor
    sink_rows: torch.Tensor

    def __post_init__(self) -> None:
        stride_bytes = self.sink_rows.stride(0) * self.sink_rows.element_size()
        if self.sink_tokens and stride_bytes != self.pages.shape[1]:
            raise ValueError(
                f"sink_rows: expected a stride of {self.pages.shape[1]} bytes, as page rows have, "
                f"got {stride_bytes}; make them with sink_rows_of"
            )

    @property
    def sink_tokens(self) -> int:
        """Leading tokens of a sequence that stay in 16 bits."""
        return int(self.sink_rows.shape[2])


def sink_rows_of(pages: torch.Tensor, layout: PageLayout, sink_tokens: int) -> torch.Tensor:
    """Read page rows as sink rows, without a copy.

    Args:
        pages: uint8 [num_rows, page_bytes], contiguous.
        layout: Layout of the pages.
        sink_tokens: Rows of K and of V, which must fit in a page row.

    Returns:
        [num_rows, 2, sink_tokens, num_kv_heads, head_dim] of `layout.row_dtype`, aliasing `pages`.
        Kernels count on its stride between rows, `page_bytes` bytes.
    """
    shape = (2, sink_tokens, layout.num_kv_heads, layout.head_dim)
    return pages.view(layout.row_dtype)[:, : math.prod(shape)].unflatten(1, shape)


@dataclass(frozen=True)
class SlotMaps:
    """Which slot a page's 16-bit rows lie in; int64 [num_pages] each, 0 (padding) without one.

    Args:
        open_slot_of: Open slot of a page; the last one after it closed.
        sink_page_of: Page row with the sink rows of a page that holds position 0.
    """

    open_slot_of: torch.Tensor
    sink_page_of: torch.Tensor


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
        sink_pages: int32 [batch], the page row with the first page's sink rows; read only when the
            first page is closed.
    """

    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    kv_last_page_len: torch.Tensor
    open_slots: torch.Tensor
    sink_pages: torch.Tensor


def num_pages_of(seq_lens: torch.Tensor) -> torch.Tensor:
    """Pages that hold `seq_lens` tokens."""
    return (seq_lens + PAGE_SIZE - 1) // PAGE_SIZE
