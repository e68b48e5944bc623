"""The page table of a decode step in plain torch: what a CPU uses, and the specification."""

from __future__ import annotations

import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.memory_pool.storage import PageTable, SlotMaps, num_pages_of


def page_table(
    seq_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    slots: SlotMaps,
) -> PageTable:
    """Look up pages and slots of a batch.

    Args:
        seq_lens: int [batch], tokens of each request, the new one included.
        req_pool_indices: int [batch], row of each request in `req_to_token`.
        req_to_token: int32 [requests, context], token slots by position, new ones included.
        slots: Which page has which slot.
    """
    num_pages = num_pages_of(seq_lens.long())
    request = torch.repeat_interleave(num_pages)
    end = num_pages.cumsum(0)
    begin = end - num_pages
    page_index = torch.arange(len(request), device=request.device) - begin[request]
    rows = req_pool_indices.long()[request]
    pages = req_to_token[rows, page_index * PAGE_SIZE] // PAGE_SIZE
    return PageTable(
        kv_indptr=torch.nn.functional.pad(end, (1, 0)).int(),
        kv_indices=pages,
        kv_last_page_len=((seq_lens - 1) % PAGE_SIZE + 1).int(),
        open_slots=slots.open_slot_of[pages[end - 1].long()].int(),
        sink_pages=slots.sink_page_of[pages[begin].long()].int(),
    )
