"""Decode attention over quantized pages against bf16 and fp8 decode kernels.

Usage: python -m benchmarks.kernels.decode [--formats ...] [--shapes BxL ...] [--out CSV]

Every system of a shape runs in turn, as a CUDA graph over several copies of its input, so that no
call finds its data in the L2 cache. FlashInfer, with tensor cores, and on Hopper SGLang's
FlashAttention-3 run at their best page size. A row also says what bounds it: the loads without
arithmetic (`us_load`), and the same arithmetic on a few pages that stay in the L2 cache
(`us_compute`). With `--against DIR` the kernels of another checkout run in turn with ours
(`us_against`, `x_against`).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.kernels.decode_baselines import baselines
from benchmarks.kernels.decode_bounds import few_pages, load_only
from benchmarks.kernels.harness import (
    copy_gbps,
    num_copies,
    time_interleaved,
    write_results,
)
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.quantize import encode_pages
from sgl_kvq.host.flash_attention_3 import HOPPER
from sgl_kvq.kernels.decode.api import DecodeWorkspace, decode
from sgl_kvq.memory_pool.storage import PagedCache, PageTable, sink_rows_of
from testbed.formats import named_format

FORMATS = ("hack2", "kivi2", "hack4", "kivi4", "saw4")
SHAPES = (
    *("1x131072", "8x32768", "32x8192", "64x8192", "128x2048"),
    *("8x1024", "32x1024", "64x1024"),
)
SINK_TOKENS = 4
_SAMPLE_PAGES = 64  # distinct contents; a pool repeats them


def make_cache(layout: PageLayout, num_pages: int, batch: int) -> PagedCache:
    """A pool of quantized random pages; slot 0 and page 0 are padding."""
    shape = (_SAMPLE_PAGES, PAGE_SIZE, layout.num_kv_heads, layout.head_dim)
    k, v = (torch.randn(shape, device="cuda").to(layout.row_dtype) for _ in range(2))
    sinks = torch.zeros(_SAMPLE_PAGES, dtype=torch.int32, device="cuda")
    sample = encode_pages(k, v, sinks, layout)
    rows = (layout.num_kv_heads, layout.head_dim)
    slots = (batch + 1, 2)
    sink_pages = torch.zeros((batch + 1, layout.page_bytes), dtype=torch.uint8, device="cuda")
    sinks = sink_rows_of(sink_pages, layout, SINK_TOKENS).normal_()
    return PagedCache(
        pages=sample.repeat(-(-(num_pages + 1) // _SAMPLE_PAGES), 1)[: num_pages + 1].contiguous(),
        open_rows=torch.randn((*slots, PAGE_SIZE, *rows), device="cuda").to(layout.row_dtype),
        sink_rows=sinks,
    )


def make_table(batch: int, length: int) -> PageTable:
    """Requests of equal length over shuffled pages."""
    pages = -(-length // PAGE_SIZE)
    options: dict[str, Any] = {"dtype": torch.int32, "device": "cuda"}
    slots = torch.arange(1, batch + 1, **options)
    return PageTable(
        kv_indptr=torch.arange(batch + 1, **options) * pages,
        kv_indices=(torch.randperm(batch * pages, device="cuda") + 1).int(),
        kv_last_page_len=torch.full((batch,), (length - 1) % PAGE_SIZE + 1, **options),
        open_slots=slots,
        sink_pages=slots,
    )


def ours(
    name: str, batch: int, length: int, num_kv_heads: int, gqa: int, head_dim: int
) -> tuple[dict[str, Callable[[int], Any]], int, int]:
    """Calls by name, bytes of closed pages a call reads, copies they rotate among."""
    layout = PageLayout(named_format(name), head_dim, num_kv_heads)
    num_pages = batch * -(-length // PAGE_SIZE)
    read_bytes = num_pages * layout.page_bytes
    copies = num_copies(read_bytes)
    caches = [make_cache(layout, num_pages, batch) for _ in range(copies)]
    table = make_table(batch, length)
    hot = few_pages(table, min(64, num_pages))
    q = torch.randn((batch, num_kv_heads * gqa, head_dim), device="cuda").to(layout.row_dtype)
    ws = DecodeWorkspace(batch, num_kv_heads * gqa, layout, "cuda")
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device="cuda")
    sm_scale = head_dim**-0.5

    def attend(table: PageTable) -> Callable[[int], Any]:
        return lambda copy: decode(q, caches[copy], table, layout, sm_scale, ws, out, lse)

    calls = {
        "ours": attend(table),
        "load": lambda copy: load_only(caches[copy], table, layout, ws),
        "compute": attend(hot),
    }
    return calls, read_bytes, copies


def other_checkout(folder: Path) -> ModuleType:
    """Import this benchmark and its `sgl_kvq` from another checkout, beside those of this one."""

    def modules() -> dict[str, ModuleType]:
        roots = ("benchmarks", "sgl_kvq")
        return {name: sys.modules[name] for name in sys.modules if name.split(".")[0] in roots}

    ours = modules()
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(folder.resolve()))
    try:
        found = importlib.import_module("benchmarks.kernels.decode")
    finally:
        sys.path.pop(0)
        for name in modules():
            del sys.modules[name]
        sys.modules.update(ours)
    if not Path(found.__file__ or "").is_relative_to(folder.resolve()):
        raise ValueError(f"--against: expected a checkout, got {folder} without this benchmark")
    return found


def measure(
    formats: list[str], batch: int, length: int, num_kv_heads: int, gqa: int, head_dim: int,
    copy_rate: float, with_baselines: bool, against: ModuleType | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of one shape."""
    shape = (batch, length, num_kv_heads, gqa, head_dim)
    is_hopper = torch.cuda.get_device_capability()[0] == HOPPER
    others = baselines(shape, is_hopper) if with_baselines else {}
    rows = []
    for name in formats:
        calls, read_bytes, copies = ours(name, *shape)
        if against:
            theirs, _, own = against.ours(name, *shape)
            calls["against"] = _modulo(theirs["ours"], own)
        calls |= {system: _modulo(call, own) for system, (call, own) in others.items()}
        times = time_interleaved(calls, copies)
        coding = named_format(name)
        us = times["ours"].p50
        row: dict[str, Any] = {
            "format": name, "bits_k": coding.k.num_bits, "bits_v": coding.v.num_bits,
            "batch": batch, "length": length, "head_dim": head_dim, "gqa": gqa,
            "us_p20": round(times["ours"].p20, 2), "us_p50": round(us, 2),
            "us_p80": round(times["ours"].p80, 2),
        }  # fmt: skip
        found = {system: times[system].p50 for system in others}
        for system in ("bf16", "fp8", "fa3", "fa3_fp8"):
            row[f"us_{system}"] = round(found[system], 2) if system in found else ""
        bf16 = [found[system] for system in ("bf16", "fa3") if system in found]
        row["x_best_bf16"] = round(min(bf16) / us, 2) if bf16 else ""
        for system in ("fp8", "fa3_fp8"):
            row[f"x_{system}"] = round(found[system] / us, 2) if system in found else ""
        if against:
            row["us_against"] = round(times["against"].p50, 2)
            row["x_against"] = round(times["against"].p50 / us, 3)
        gbps = read_bytes / us / 1e3
        row |= {
            "gbps": round(gbps), "share_of_copy": round(gbps / copy_rate, 3),
            "us_load": round(times["load"].p50, 2), "us_compute": round(times["compute"].p50, 2),
        }  # fmt: skip
        rows.append(row)
        del calls
        torch.cuda.empty_cache()
    print(tabulate(rows, headers="keys"), flush=True)
    return rows


def _modulo(call: Callable[[int], Any], copies: int) -> Callable[[int], Any]:
    return lambda copy: call(copy % copies)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="BATCHxLENGTH")
    parser.add_argument("--no-baselines", action="store_true", help="ours alone")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/h200/decode.csv"))
    args = parser.parse_args()
    against = other_checkout(args.against) if args.against else None
    torch.manual_seed(0)
    rate = copy_gbps()
    print(f"copy: {rate:.0f} GB/s")
    cases = [(*map(int, shape.split("x")), 8, 4, 128) for shape in args.shapes]
    if args.shapes == list(SHAPES):
        cases += [(32, 8192, 8, 4, 64), (32, 8192, 8, 4, 256), (32, 8192, 8, 1, 128)]
        cases += [(32, 8192, 2, 16, 128)]
    rows = []
    for case in cases:
        formats = args.formats if case[2:] == (8, 4, 128) else [*args.formats[:1], "hack4"]
        rows += measure(
            formats, *case, copy_rate=rate, with_baselines=not args.no_baselines, against=against
        )
        write_results(args.out, [{**row, "copy_gbps": round(rate)} for row in rows])


if __name__ == "__main__":
    main()
