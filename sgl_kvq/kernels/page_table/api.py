"""Page tables of a decode step, made on the device in one launch."""

from __future__ import annotations

import torch

from sgl_kvq.kernels.page_table.kernel import _tables_fwd_kernel
from sgl_kvq.memory_pool.storage import PageTable, SlotMaps


class DecodeTables:
    """Buffers for the page table of a decode step.

    They keep their addresses, so that a CUDA graph that was captured with them reads what `update`
    wrote last.

    Args:
        max_batch: Largest batch.
        max_pages: Pages of a batch, shared ones counted as often as they are used.
        device: Where they live.
    """

    def __init__(self, max_batch: int, max_pages: int, device: torch.device | str) -> None:
        self._fields = torch.zeros((3, max_batch), dtype=torch.int32, device=device)
        self._indptr = torch.zeros(max_batch + 1, dtype=torch.int32, device=device)
        self._indices = torch.zeros(max_pages, dtype=torch.int32, device=device)

    def update(
        self,
        seq_lens: torch.Tensor,
        req_pool_indices: torch.Tensor,
        req_to_token: torch.Tensor,
        slots: SlotMaps,
    ) -> PageTable:
        """Write the table of a batch.

        Args:
            seq_lens: int [batch], tokens of each request, the new one included. A padding row has
                length 1 and stands for page and slot 0.
            req_pool_indices: int [batch], row of each request in `req_to_token`.
            req_to_token: int32 [requests, context], token slots by position, new ones included.
            slots: Which page has which slot.

        Returns:
            Views of the buffers.
        """
        batch = len(seq_lens)
        fields = self._fields
        _tables_fwd_kernel[(batch,)](
            seq_lens, req_pool_indices, req_to_token, req_to_token.stride(0),
            slots.open_slot_of, slots.sink_page_of, batch, fields, fields.stride(0),
            self._indptr, self._indices, num_warps=4,
        )  # fmt: skip
        last_page_len, open_slots, sink_pages = fields[:, :batch]
        indptr = self._indptr[: batch + 1]
        return PageTable(indptr, self._indices, last_page_len, open_slots, sink_pages)
