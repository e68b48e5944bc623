"""Random caches and errors for kernel tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.dequantize import decode_keys, decode_values
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.quantize import encode_pages
from sgl_kvq.memory_pool.storage import PagedCache, PageTable
from testbed.formats import named_format
from tests.support.sink_rows import empty_sink_rows

CHOSEN_BITS = ("4:2:2", "2:16:2", "2:5:4", "4:16:4")
"""Members of the kvq family that only a calibrated file asks for: K, outlier sixteenths, V."""


@dataclass(frozen=True)
class RandomCache:
    """A poisoned cache with shuffled pages, and what each request must see of it.

    `kv` holds (K, V) fp64 [tokens, num_kv_heads, head_dim] a request: dequantized closed pages with
    exact sink rows, then the exact rows of the last page.
    """

    layout: PageLayout
    cache: PagedCache
    table: PageTable
    kv: list[tuple[torch.Tensor, torch.Tensor]]


def random_rows(
    shape: tuple[int, ...], generator: torch.Generator, outliers: bool = True
) -> torch.Tensor:
    """bfloat16 rows whose channels differ in size, as keys do."""
    rows = torch.randn(shape, generator=generator)
    if outliers:
        rows = rows * torch.exp(0.7 * torch.randn(shape[-2:], generator=generator))
    return rows.to(torch.bfloat16)


def random_cache(
    format_name: str,
    head_dim: int,
    num_kv_heads: int,
    seq_lens: list[int],
    sink_tokens: int,
    generator: torch.Generator,
) -> RandomCache:
    """Fill a cache; everything nobody may read is NaN (rows) or 0xFF (bytes)."""
    layout = PageLayout(named_format(format_name), head_dim, num_kv_heads)
    counts = [-(-seq_len // PAGE_SIZE) for seq_len in seq_lens]
    total, batch = sum(counts), len(seq_lens)
    shape = (total, PAGE_SIZE, num_kv_heads, head_dim)
    k, v = random_rows(shape, generator), random_rows(shape, generator, outliers=False)
    kv_indptr = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32)
    num_sinks = torch.zeros(total, dtype=torch.int32)
    num_sinks[kv_indptr[:-1].long()] = sink_tokens
    encoded = encode_pages(k, v, num_sinks, layout)

    pages = torch.full((2 * total + 1, layout.page_bytes), 0xFF, dtype=torch.uint8)
    kv_indices = torch.randperm(2 * total, generator=generator)[:total] + 1
    slots = torch.randperm(2 * batch, generator=generator)[:batch] + 1
    rows = (2 * batch + 1, 2)
    open_rows = torch.full(
        (*rows, PAGE_SIZE, num_kv_heads, head_dim), torch.nan, dtype=torch.bfloat16
    )
    sink_rows = empty_sink_rows(layout, 2 * batch + 1, sink_tokens, "cpu")
    dequantized = [
        decode(encoded, layout).double().transpose(1, 2) for decode in (decode_keys, decode_values)
    ]
    seen = []
    for i, (seq_len, slot) in enumerate(zip(seq_lens, slots.tolist(), strict=True)):
        first, last = int(kv_indptr[i]), int(kv_indptr[i + 1]) - 1
        length = seq_len - (last - first) * PAGE_SIZE
        exact = torch.stack([k[last, :length], v[last, :length]])
        open_rows[slot, :, :length] = exact
        closed = torch.stack([d[first:last].flatten(0, 1) for d in dequantized])
        if last > first:
            pages[kv_indices[first:last]] = encoded[first:last]
            sinks = torch.stack([k[first, :sink_tokens], v[first, :sink_tokens]])
            sink_rows[slot] = sinks
            closed[:, :sink_tokens] = sinks.double()
        keys, values = torch.cat([closed, exact.double()], dim=1)
        seen.append((keys, values))
    table = PageTable(
        kv_indptr=kv_indptr,
        kv_indices=kv_indices.int(),
        kv_last_page_len=torch.tensor(seq_lens, dtype=torch.int32).sub(1).remainder(PAGE_SIZE) + 1,
        open_slots=slots.int(),
        sink_pages=slots.int(),
    )
    return RandomCache(layout, PagedCache(pages, open_rows, sink_rows), table, seen)


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """||out - reference|| / ||reference||; NaN never passes a comparison."""
    difference = (out.double() - reference.double()).norm() / reference.double().norm()
    return float(difference)
