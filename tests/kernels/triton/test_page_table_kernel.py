from __future__ import annotations

import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.kernels.page_table.api import DecodeTables
from sgl_kvq.memory_pool.storage import SlotMaps


def test_tables_of_ragged_requests_and_padding(device: str) -> None:
    """Against plain torch, rows shuffled, two padding rows."""
    generator = torch.Generator().manual_seed(0)
    seq_lens = torch.tensor([1, 64, 65, 20_000, 130, 1, 1])
    rows = torch.tensor([3, 1, 4, 2, 5, 0, 0])
    req_to_token = torch.randint(0, 1 << 22, (6, 20_032), generator=generator, dtype=torch.int32)
    req_to_token[0] = 0
    num_pages = (1 << 22) // PAGE_SIZE
    own = req_to_token[rows][:, ::PAGE_SIZE].long() // PAGE_SIZE
    last = torch.stack([req_to_token[r, n - 1] for r, n in zip(rows, seq_lens, strict=True)])
    open_slot_of = torch.zeros(num_pages, dtype=torch.int64)
    sink_page_of = torch.zeros(num_pages, dtype=torch.int64)
    open_slot_of[last // PAGE_SIZE] = torch.tensor([9, 8, 7, 6, 5, 0, 0])
    sink_page_of[own[:, 0]] = torch.tensor([1, 2, 3, 4, 5, 0, 0])

    tables = DecodeTables(8, 8 * 313, device)
    table = tables.update(
        seq_lens.to(device),
        rows.to(device),
        req_to_token.to(device),
        SlotMaps(open_slot_of.to(device), sink_page_of.to(device)),
    )
    counts = -(-seq_lens // PAGE_SIZE)
    assert table.kv_indptr.tolist() == [0, *counts.cumsum(0).tolist()]
    expected = torch.cat([pages[:count] for pages, count in zip(own, counts, strict=True)])
    assert table.kv_indices[: len(expected)].tolist() == expected.tolist()
    assert table.kv_last_page_len.tolist() == [1, 64, 1, 32, 2, 1, 1]
    assert table.open_slots.tolist() == [9, 8, 7, 6, 5, 0, 0]
    assert table.sink_pages.tolist() == [1, 2, 3, 4, 5, 0, 0]
