"""Page tables of a decode step, made on the device in one launch, so that CUDA graphs hold it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sgl_kvq.kernels._layouts import PAGE
from sgl_kvq.kernels.append.api import TouchedPages
from sgl_kvq.kernels.paged_cache import PageTable, SlotMaps

BLOCK: tl.constexpr = tl.constexpr(256)


@triton.jit(
    do_not_specialize=("batch", "stride_r"),
    do_not_specialize_on_alignment=("seq_lens_ptr", "rows_ptr", "out_cache_loc_ptr"),
)
def _tables_fwd_kernel(
    seq_lens_ptr, rows_ptr, out_cache_loc_ptr, req_to_token_ptr, stride_r,
    open_slot_of_ptr, sink_slot_of_ptr, batch, fields_ptr, stride_f, kv_indptr_ptr, kv_indices_ptr,
):  # fmt: skip
    """One program a request: its place in the table, its pages, and the row it appends."""
    request = tl.program_id(0)
    begin = tl.zeros([], tl.int32)
    for start in range(0, batch, BLOCK):
        other = start + tl.arange(0, BLOCK)
        lens = tl.load(seq_lens_ptr + other, mask=other < request, other=0).to(tl.int32)
        begin += tl.sum((lens + PAGE - 1) // PAGE, axis=0)
    seq_len = tl.load(seq_lens_ptr + request).to(tl.int32)
    num_pages = (seq_len + PAGE - 1) // PAGE
    tl.store(kv_indptr_ptr + request, begin)
    if request == batch - 1:
        tl.store(kv_indptr_ptr + batch, begin + num_pages)
    row_ptr = req_to_token_ptr + tl.load(rows_ptr + request).to(tl.int64) * stride_r
    for start in range(0, num_pages, BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = index < num_pages
        page = tl.load(row_ptr + index * PAGE, mask=mask, other=0) // PAGE
        tl.store(kv_indices_ptr + begin + index, page, mask=mask)
    first_page = tl.load(row_ptr) // PAGE
    out_page = (tl.load(out_cache_loc_ptr + request) // PAGE).to(tl.int32)
    open_slot = tl.load(open_slot_of_ptr + out_page).to(tl.int32)
    sink_slot = tl.load(sink_slot_of_ptr + first_page).to(tl.int32)
    offset = (seq_len - 1) % PAGE
    field_ptr = fields_ptr + request
    tl.store(field_ptr, out_page)
    tl.store(field_ptr + stride_f, open_slot)
    tl.store(field_ptr + 2 * stride_f, sink_slot)
    tl.store(field_ptr + 3 * stride_f, offset)
    tl.store(field_ptr + 4 * stride_f, offset + 1)
    tl.store(field_ptr + 5 * stride_f, request)
    tl.store(field_ptr + 6 * stride_f, (seq_len <= PAGE).to(tl.int32))


class DecodeTables:
    """Buffers for the page table and the appended rows of a decode step.

    They keep their addresses, so that a CUDA graph that was captured with them reads what `update`
    wrote last. `update` may be captured too.

    Args:
        max_batch: Largest batch.
        max_pages: Pages of a batch, shared ones counted as often as they are used.
        device: Where they live.
    """

    def __init__(self, max_batch: int, max_pages: int, device: torch.device | str) -> None:
        self._fields = torch.zeros((7, max_batch), dtype=torch.int32, device=device)
        self._indptr = torch.zeros(max_batch + 1, dtype=torch.int32, device=device)
        self._indices = torch.zeros(max_pages, dtype=torch.int32, device=device)

    def update(
        self,
        seq_lens: torch.Tensor,
        req_pool_indices: torch.Tensor,
        out_cache_loc: torch.Tensor,
        req_to_token: torch.Tensor,
        slots: SlotMaps,
    ) -> tuple[PageTable, TouchedPages]:
        """Write the tables of a batch.

        Args:
            seq_lens: int [batch], tokens of each request, the new one included. A padding row has
                length 1 and stands for page and slot 0.
            req_pool_indices: int [batch], row of each request in `req_to_token`.
            out_cache_loc: int [batch], token slot of the new token.
            req_to_token: int32 [requests, context], token slots by position.
            slots: Which page has which slot.

        Returns:
            (page table, appended rows): views of the buffers.
        """
        batch = len(seq_lens)
        fields = self._fields
        _tables_fwd_kernel[(batch,)](
            seq_lens, req_pool_indices, out_cache_loc, req_to_token, req_to_token.stride(0),
            slots.open_slot_of, slots.sink_slot_of, batch, fields, fields.stride(0),
            self._indptr, self._indices, num_warps=4,
        )  # fmt: skip
        page, open_slot, sink_slot, first, end, start, is_first = fields[:, :batch]
        table = PageTable(self._indptr[: batch + 1], self._indices, end, open_slot, sink_slot)
        touched = TouchedPages(page, open_slot, sink_slot, open_slot, first, end, start, is_first)
        return table, touched
