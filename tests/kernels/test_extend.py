from __future__ import annotations

import pytest
import torch

from sgl_kvq.attention.plan.extend import closed_fill, plan_extend
from sgl_kvq.attention.plan.upload import upload_extend
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.dequantize import decode_keys, decode_values
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.registry import get_format
from sgl_kvq.kernels.append.cpu import append_extend, plan_append_extend
from sgl_kvq.kernels.decode.reference import attend
from sgl_kvq.kernels.extend.passes import ExtendPlan
from sgl_kvq.kernels.extend.reference import extend
from sgl_kvq.memory_pool.storage import PagedCache, SlotMaps
from tests.support.attention import random_rows, relative_error
from tests.support.sink_rows import empty_sink_rows

HEADS, GROUP, HEAD_DIM, SINKS = 2, 3, 64, 4


def poisoned_cache(layout: PageLayout, num_pages: int) -> PagedCache:
    rows = (2, PAGE_SIZE, HEADS, HEAD_DIM)
    return PagedCache(
        pages=torch.full((num_pages + 1, layout.page_bytes), 0xFF, dtype=torch.uint8),
        open_rows=torch.full((4, *rows), torch.nan, dtype=torch.bfloat16),
        sink_rows=empty_sink_rows(layout, 4, SINKS, "cpu"),
    )


def step(
    plan: ExtendPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: PagedCache,
    layout: PageLayout,
    pages: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append and attend; request i has its 16-bit rows in slot i + 1. Returns out, touched rows."""
    req_to_token = torch.zeros((len(pages), 1024), dtype=torch.int32)
    slot_of = torch.zeros(len(cache.pages), dtype=torch.int64)
    for row, own in enumerate(pages):
        tokens = own[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)
        req_to_token[row, : tokens.numel()] = tokens.flatten()
        slot_of[own] = row + 1
    closed = [closed_fill(request, 0, request.num_closed, 0) for request in plan.requests]
    slots = SlotMaps(slot_of, slot_of)
    batch = upload_extend(plan, closed, torch.arange(len(pages)), req_to_token, slots)
    append = plan_append_extend(batch.touched, batch.resumed_slots)
    rows, num_nonfinite = append_extend(cache, layout, k, v, append)
    assert int(num_nonfinite) == 0
    return extend(q, cache, layout, plan.requests, batch.fills, rows, 0.125), rows


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
        plan = plan_extend([prefix_len], [chunk], quantized_prefill)
        out[fresh], _ = step(plan, q[fresh], k[fresh], v[fresh], cache, layout, [pages])
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
    pages = [torch.tensor([7]), torch.tensor([2])]
    out, rows = step(plan_extend([0, 0], [30, 60], False), q, k, v, cache, layout, pages)
    assert torch.equal(rows[0, 0, :30], k[:30])
    assert torch.equal(rows[1, 1, :60], v[30:])
    for start, end in ((0, 30), (30, 90)):
        for i in range(start, end):
            seen = slice(start, i + 1)
            expected, _ = attend(q[i], k[seen].double(), v[seen].double(), 0.125)
            assert relative_error(out[i], expected) < 1e-5
