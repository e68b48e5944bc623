from __future__ import annotations

import pytest
import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.dequantize import decode_keys, decode_values
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.registry import get_format
from sgl_kvq.kernels.append.cpu import ClosingPages, ExtendAppend, append_extend
from sgl_kvq.kernels.decode.reference import attend
from sgl_kvq.kernels.extend.reference import ExtendRequest, closed_pages_read, extend
from sgl_kvq.memory_pool.storage import PagedCache
from tests.support.attention import random_rows, relative_error

HEADS, GROUP, HEAD_DIM, SINKS = 2, 3, 64, 4


def poisoned_cache(layout: PageLayout, num_pages: int) -> PagedCache:
    rows = (2, PAGE_SIZE, HEADS, HEAD_DIM)
    return PagedCache(
        pages=torch.full((num_pages + 1, layout.page_bytes), 0xFF, dtype=torch.uint8),
        open_rows=torch.full((4, *rows), torch.nan, dtype=torch.bfloat16),
        sink_rows=torch.full((4, 2, SINKS, HEADS, HEAD_DIM), torch.nan, dtype=torch.bfloat16),
    )


def append_plan(prefix_len: int, seq_len: int, pages: torch.Tensor, slot: int) -> ExtendAppend:
    first = prefix_len // PAGE_SIZE
    count = -(-seq_len // PAGE_SIZE) - first
    closing = list(range(seq_len // PAGE_SIZE - first))
    kept = [count - 1] if seq_len % PAGE_SIZE else []
    position = torch.arange(prefix_len, seq_len) - first * PAGE_SIZE
    has_first = [0] if first == 0 and closing else []
    return ExtendAppend(
        num_touched=count,
        touched=position // PAGE_SIZE,
        offsets=position % PAGE_SIZE,
        resumed=torch.tensor([0] if prefix_len % PAGE_SIZE else [], dtype=torch.int64),
        resumed_slots=torch.tensor([slot] if prefix_len % PAGE_SIZE else [], dtype=torch.int64),
        kept_open=torch.tensor(kept, dtype=torch.int64),
        kept_slots=torch.tensor([slot] * len(kept), dtype=torch.int64),
        closing=ClosingPages(
            rows=torch.tensor(closing, dtype=torch.int64),
            pages=pages[first : first + len(closing)],
            first=torch.tensor(has_first, dtype=torch.int64),
            sink_slots=torch.tensor([slot] * len(has_first), dtype=torch.int64),
        ),
    )


@pytest.mark.parametrize("quantized_prefill", [False, True])
@pytest.mark.parametrize("chunks", [[500], [64, 436], [128, 128, 244], [100, 1, 399], [448, 51, 1]])
@pytest.mark.parametrize("name", ["hack2", "saw4", "hack2-v1", "bf16"])
def test_chunks_against_fp64(name: str, chunks: list[int], quantized_prefill: bool) -> None:
    """Append and attend chunk by chunk; every query must see codes and rows as its mode says."""
    generator = torch.Generator().manual_seed(len(chunks))
    layout = PageLayout(get_format(name), HEAD_DIM, HEADS)
    total = sum(chunks)
    k, v = (random_rows((total, HEADS, HEAD_DIM), generator) for _ in range(2))
    q = torch.randn(total, HEADS * GROUP, HEAD_DIM, generator=generator)
    cache = poisoned_cache(layout, 40)
    pages = torch.randperm(40, generator=generator)[: -(-total // PAGE_SIZE)] + 1
    out = torch.full_like(q, torch.nan)
    prefix_lens = []
    prefix_len = 0
    for chunk in chunks:
        seq_len = prefix_len + chunk
        fresh = slice(prefix_len, seq_len)
        plan = append_plan(prefix_len, seq_len, pages, slot=2)
        rows, contained = append_extend(cache, layout, k[fresh], v[fresh], plan)
        assert int(contained) == 0
        read = pages[: closed_pages_read(prefix_len, seq_len, quantized_prefill)]
        request = ExtendRequest(prefix_len, seq_len, 0, read, 0, sink_slot=2)
        out[fresh] = extend(
            q[fresh],
            cache.pages,
            rows,
            cache.sink_rows,
            [request],
            layout,
            0.125,
            quantized_prefill,
        )
        prefix_lens += [prefix_len] * chunk
        prefix_len = seq_len

    full = total // PAGE_SIZE
    closed = cache.pages[pages[:full]]
    codes = [d(closed, layout).transpose(1, 2).flatten(0, 1).double() for d in
             (decode_keys, decode_values)]  # fmt: skip
    for values, rows in zip(codes, (k, v), strict=True):
        values[:SINKS] = rows[:SINKS].double()
    expected = torch.empty_like(q, dtype=torch.float64)
    for i in range(total):
        boundary = i if quantized_prefill else prefix_lens[i]
        in_codes = boundary // PAGE_SIZE * PAGE_SIZE
        keys, values = (
            torch.cat([c[:in_codes], rows[in_codes : i + 1].double()])
            for c, rows in zip(codes, (k, v), strict=True)
        )
        expected[i], _ = attend(q[i], keys, values, 0.125)
    assert relative_error(out, expected) < 1e-5


def test_two_requests_do_not_see_each_other() -> None:
    generator = torch.Generator().manual_seed(9)
    layout = PageLayout(get_format("hack4"), HEAD_DIM, HEADS)
    cache = poisoned_cache(layout, 10)
    k, v = (random_rows((90, HEADS, HEAD_DIM), generator) for _ in range(2))
    q = torch.randn(90, HEADS * GROUP, HEAD_DIM, generator=generator)
    shape = (3, 2, PAGE_SIZE, HEADS, HEAD_DIM)
    rows = torch.full(shape, torch.nan, dtype=torch.bfloat16)
    rows[0, 0, :30], rows[0, 1, :30] = k[:30], v[:30]
    rows[1, 0, :60], rows[1, 1, :60] = k[30:], v[30:]
    none = torch.empty(0, dtype=torch.int64)
    requests = [ExtendRequest(0, 30, 0, none, 0, 0), ExtendRequest(0, 60, 30, none, 1, 0)]
    out = extend(q, cache.pages, rows, cache.sink_rows, requests, layout, 0.125, False)
    for start, end in ((0, 30), (30, 90)):
        for i in range(start, end):
            seen = slice(start, i + 1)
            expected, _ = attend(q[i], k[seen].double(), v[seen].double(), 0.125)
            assert relative_error(out[i], expected) < 1e-5
