"""What storing fresh rows and quantizing full pages adds to the attention of a decode step.

Usage: python -m benchmarks.kernels.append [--formats ...] [--batch 64] [--length 8192] [--out CSV]

A step runs all layers: attention that also stores the fresh row of each request, and one launch
that closes the pages they fill. `us_decode` is the attention alone, rows being in place, on the
same lengths; all columns are microseconds a layer. A step closes a page for each request whose page
fills. With ragged lengths that is one request in 64, so `us_mean` weighs steps that close 0, 1, 2
and 4 pages by their binomial probabilities.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.kernels.decode import make_cache, make_table
from benchmarks.kernels.harness import time_interleaved, write_results
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.registry import get_format
from sgl_kvq.kernels.append.api import PagedLayers, close_pages
from sgl_kvq.kernels.decode.api import DecodeWorkspace, decode
from sgl_kvq.memory_pool.storage import PageTable

CLOSING = (0, 1, 2, 4)
NUM_KV_HEADS, GQA, HEAD_DIM = 8, 4, 128


def ragged_table(batch: int, length: int, closing: int) -> PageTable:
    """Shuffled pages; last pages of all lengths, of which `closing` are full."""
    table = make_table(batch, length)
    rows = torch.arange(batch, dtype=torch.int32, device="cuda") % (PAGE_SIZE - 1) + 1
    rows[torch.randperm(batch, device="cuda")[:closing]] = PAGE_SIZE
    return replace(table, kv_last_page_len=rows)


def steps(
    name: str, batch: int, length: int, num_layers: int
) -> dict[tuple[str, int], Callable[[int], Any]]:
    """Decode steps by (what, pages that close): attention alone, with storing, with closing too."""
    layout = PageLayout(get_format(name), HEAD_DIM, NUM_KV_HEADS)
    num_pages = batch * -(-length // PAGE_SIZE)
    caches = [make_cache(layout, num_pages, batch) for _ in range(num_layers)]
    layers = PagedLayers(caches)
    heads = NUM_KV_HEADS * GQA
    q = torch.randn((batch, heads + 2 * NUM_KV_HEADS, HEAD_DIM), device="cuda")
    q, k, v = q.to(layout.row_dtype).split([heads, NUM_KV_HEADS, NUM_KV_HEADS], 1)
    ws = DecodeWorkspace(batch, heads, layout, "cuda")
    out = torch.empty((batch, heads, HEAD_DIM), dtype=layout.row_dtype, device="cuda")
    lse = torch.empty(out.shape[:2], device="cuda")
    count = torch.zeros((), dtype=torch.int64, device="cuda")

    def step(table: PageTable, stores: bool, closes: bool) -> Callable[[int], Any]:
        def run(_copy: int) -> None:
            for cache in caches:
                fresh = (k, v) if stores else None
                decode(q, cache, table, layout, HEAD_DIM**-0.5, ws, out, lse, fresh)
            if closes:
                close_pages(layers, layout, table, count)

        return run

    calls = {}
    for closing in CLOSING:
        table = ragged_table(batch, length, closing)
        calls["decode", closing] = step(table, stores=False, closes=False)
        calls["store", closing] = step(table, stores=True, closes=False)
        calls["close", closing] = step(table, stores=True, closes=True)
    return calls


def mean_us(by_closing: dict[int, float], batch: int) -> float:
    """Expected time of a step of `batch` requests of random length; few close more than four."""
    total = weight = 0.0
    for closing, us in by_closing.items():
        following = [n for n in by_closing if n > closing]
        end = following[0] if following else batch + 1
        share = sum(
            math.comb(batch, n) * (1 / PAGE_SIZE) ** n * (1 - 1 / PAGE_SIZE) ** (batch - n)
            for n in range(closing, end)
        )
        total += share * us
        weight += share
    return total / weight


def measure(name: str, batch: int, length: int, num_layers: int) -> dict[str, Any]:
    """One format's row."""
    times = time_interleaved(steps(name, batch, length, num_layers), copies=1)
    us = {key: timing.p50 / num_layers for key, timing in times.items()}
    decode_us, store_us, close_us = (
        {closing: us[what, closing] for closing in CLOSING} for what in ("decode", "store", "close")
    )
    added = {closing: close_us[closing] - decode_us[closing] for closing in CLOSING}
    mean, decode_mean = mean_us(added, batch), mean_us(decode_us, batch)
    row: dict[str, Any] = {"format": name, "batch": batch, "length": length, "layers": num_layers}
    row["us_store"] = round(mean_us(store_us, batch) - decode_mean, 2)
    row |= {f"us_close_{closing}": round(value, 2) for closing, value in added.items()}
    row |= {"us_mean": round(mean, 2), "us_decode": round(decode_mean, 2)}
    row |= {"us_step": round(mean_us(close_us, batch), 2)}
    row["share_of_decode"] = round(mean / decode_mean, 4)
    return row


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--formats", nargs="+", default=["hack2", "hack4", "kivi2", "saw4", "kvq2", "kvq4"]
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/h100/append.csv"))
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for name in args.formats:
        rows.append(measure(name, args.batch, args.length, args.layers))
        write_results(args.out, rows)
        torch.cuda.empty_cache()
    print(tabulate(rows, headers="keys"))


if __name__ == "__main__":
    main()
