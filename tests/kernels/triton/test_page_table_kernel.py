from __future__ import annotations

import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.kernels.page_table.api import DecodeTables
from sgl_kvq.kernels.page_table.reference import page_table
from sgl_kvq.memory_pool.storage import SlotMaps


def test_tables_of_ragged_requests_and_padding(device: str) -> None:
    """Kernel and reference, rows shuffled, two padding rows."""
    generator = torch.Generator().manual_seed(0)
    seq_lens = torch.tensor([1, 64, 65, 20_000, 130, 1, 1])
    rows = torch.tensor([3, 1, 4, 2, 5, 0, 0])
    num_pages = 1 << 16
    ids = torch.randperm(num_pages, generator=generator)[: 6 * 313].view(6, 313, 1)
    req_to_token = (ids * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten(1).int()
    req_to_token[0] = 0
    own = req_to_token[rows][:, ::PAGE_SIZE].long() // PAGE_SIZE
    last = torch.stack([req_to_token[r, n - 1] for r, n in zip(rows, seq_lens, strict=True)])
    open_slot_of = torch.zeros(num_pages, dtype=torch.int64)
    sink_page_of = torch.zeros(num_pages, dtype=torch.int64)
    open_slot_of[last // PAGE_SIZE] = torch.tensor([9, 8, 7, 6, 5, 0, 0])
    sink_page_of[own[:, 0]] = torch.tensor([1, 2, 3, 4, 5, 0, 0])

    tables = DecodeTables(8, 8 * 313, device)
    found = tables.update(
        seq_lens.to(device),
        rows.to(device),
        req_to_token.to(device),
        SlotMaps(open_slot_of.to(device), sink_page_of.to(device)),
    )
    specified = page_table(seq_lens, rows, req_to_token, SlotMaps(open_slot_of, sink_page_of))
    counts = -(-seq_lens // PAGE_SIZE)
    expected = torch.cat([pages[:count] for pages, count in zip(own, counts, strict=True)])
    for table in (found, specified):
        assert table.kv_indptr.tolist() == [0, *counts.cumsum(0).tolist()]
        assert table.kv_indices[: len(expected)].tolist() == expected.tolist()
        assert table.kv_last_page_len.tolist() == [1, 64, 1, 32, 2, 1, 1]
        assert table.open_slots.tolist() == [9, 8, 7, 6, 5, 0, 0]
        assert table.sink_pages.tolist() == [1, 2, 3, 4, 5, 0, 0]
