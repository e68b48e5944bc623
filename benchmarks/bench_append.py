"""The append kernel in a decode step: alone, and beside the decode attention it precedes.

Usage: python -m benchmarks.bench_append [--formats ...] [--batch 64] [--length 8192] [--out CSV]

A step closes a page for each request whose page fills. With ragged lengths that is one request in
64, so `us_mean` weighs a step that closes nothing, one that closes one page, and so on, by their
binomial probabilities.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.bench_decode import SINK_TOKENS, ours
from benchmarks.kernel_harness import time_interleaved, write_results
from sgl_kvq.config import PAGE_SIZE
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.registry import get_format
from sgl_kvq.kernels.append.api import TouchedPages, append
from sgl_kvq.kernels.paged_cache import PagedCache

CLOSING = (0, 1, 2, 4)


def step(name: str, batch: int, closing: int, num_kv_heads: int = 8, head_dim: int = 128) -> Any:
    """One decode step's append in which `closing` requests fill their page."""
    layout = PageLayout(get_format(name), head_dim, num_kv_heads)
    rows = (num_kv_heads, head_dim)
    options: dict[str, Any] = {"dtype": layout.row_dtype, "device": "cuda"}
    cache = PagedCache(
        pages=torch.zeros((batch + 1, layout.page_bytes), dtype=torch.uint8, device="cuda"),
        open_rows=torch.randn((batch + 1, 2, PAGE_SIZE, *rows), **options),
        sink_rows=torch.zeros((batch + 1, 2, SINK_TOKENS, *rows), **options),
    )
    slots = torch.arange(1, batch + 1, dtype=torch.int32, device="cuda")
    first = (slots - 1) % (PAGE_SIZE - 1)
    first[:closing] = PAGE_SIZE - 1
    touched = TouchedPages(
        pages=slots,
        slots=slots,
        sink_slots=slots,
        prior=slots,
        first=first,
        end=first + 1,
        start=slots - 1,
        is_first=torch.zeros_like(slots),
    )
    k, v = (torch.randn((batch, *rows), **options) for _ in range(2))
    count = torch.zeros((), dtype=torch.int64, device="cuda")
    return lambda _copy: append(cache, layout, k, v, touched, count)


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


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=["hack2", "hack4", "saw4"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/h100/append.csv"))
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for name in args.formats:
        calls: dict[str, Callable[[int], Any]] = {
            str(closing): step(name, args.batch, closing) for closing in CLOSING
        }
        attention, _, copies = ours(name, args.batch, args.length, 8, 4, 128)
        calls["decode"] = attention["ours"]
        times = time_interleaved(calls, copies)
        by_closing = {closing: times[str(closing)].p50 for closing in CLOSING}
        us = mean_us(by_closing, args.batch)
        row: dict[str, Any] = {"format": name, "batch": args.batch, "length": args.length}
        row |= {f"us_close_{closing}": round(value, 2) for closing, value in by_closing.items()}
        row |= {"us_mean": round(us, 2), "us_decode": round(times["decode"].p50, 2)}
        row["share_of_decode"] = round(us / times["decode"].p50, 4)
        rows.append(row)
        del calls, attention
        torch.cuda.empty_cache()
    print(tabulate(rows, headers="keys"))
    write_results(args.out, rows)


if __name__ == "__main__":
    main()
