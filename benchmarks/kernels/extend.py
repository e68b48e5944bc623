"""Extend attention over quantized pages against bf16 prefill kernels.

Usage: python -m benchmarks.kernels.extend [--formats ...] [--shapes FRESHxPREFIX ...] [--out CSV]

One request of FRESH tokens behind a cached prefix. The baselines read bf16 pages of 64 tokens:
FlashInfer's fa2 and, on Hopper, SGLang's FlashAttention-3; the row takes the better one. `us_fill`
is the part of our time that dequantizes, `us_append` what storing and quantizing the fresh rows
costs beside it (not in `us_p50`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.kernels.decode import make_cache
from benchmarks.kernels.harness import time_interleaved, write_results
from sgl_kvq.attention.plan.extend import plan_extend
from sgl_kvq.attention.plan.passes import plan_passes, scratch_pages_of
from sgl_kvq.attention.plan.upload import upload_extend
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.registry import get_format
from sgl_kvq.host.flash_attention_3 import HOPPER, FlashAttention3
from sgl_kvq.kernels.append.api import append
from sgl_kvq.kernels.extend.api import ExtendWorkspace, extend, fill_scratch
from sgl_kvq.kernels.extend.configs import scratch_pages
from sgl_kvq.kernels.extend.flashinfer_attention import FlashInferAttention
from sgl_kvq.kernels.extend.prefill_attention import AttentionShape
from sgl_kvq.memory_pool.storage import SlotMaps

FORMATS = ("kvq2", "hack2", "hack4")
SHAPES = ("2048x8192", "512x32768", "64x32768", "8192x0")
NUM_KV_HEADS, GQA, HEAD_DIM = 8, 4, 128
COPIES = 8  # more than the L2 cache holds
LIBRARIES = {"fa2": FlashInferAttention, "fa3": FlashAttention3}


def ours(
    name: str, fresh: int, prefix: int, quantized: bool, max_pages: int, library: str
) -> dict[str, Callable[[int], Any]]:
    """Calls by name: attention with its fills, the fills alone, the append."""
    layout = PageLayout(get_format(name), HEAD_DIM, NUM_KV_HEADS)
    num_pages = -(-(prefix + fresh) // PAGE_SIZE)
    caches = [make_cache(layout, num_pages, 1) for _ in range(COPIES)]
    own = torch.randperm(num_pages, device="cuda") + 1
    tokens = own[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device="cuda")
    slot_of = torch.zeros(num_pages + 1, dtype=torch.int64, device="cuda")
    slot_of[own[0]] = 1
    plan = plan_extend([prefix], [fresh], quantized)
    passes = plan_passes(plan.requests, max_pages)
    batch = upload_extend(
        plan,
        [one_pass.fills for one_pass in passes],
        torch.zeros(1, dtype=torch.int64, device="cuda"),
        tokens.flatten().int()[None],
        SlotMaps(torch.zeros_like(slot_of), slot_of),
    )
    heads = (NUM_KV_HEADS * GQA, NUM_KV_HEADS, NUM_KV_HEADS)
    q, k, v = (
        torch.randn((fresh, n, HEAD_DIM), device="cuda", dtype=layout.row_dtype) for n in heads
    )
    shape = AttentionShape(*heads[:2], HEAD_DIM, layout.row_dtype, HEAD_DIM**-0.5)
    attention = LIBRARIES[library](shape, "cuda")
    attention.plan(passes)
    workspace = ExtendWorkspace(layout, scratch_pages_of(passes), "cuda")
    count = torch.zeros((), dtype=torch.int64, device="cuda")

    def attend(copy: int) -> None:
        cache = caches[copy]
        prior_rows = batch.prior_rows(cache)
        extend(
            q, k, v, cache, layout, passes, batch.fills, batch.touched, prior_rows,
            attention, workspace,
        )  # fmt: skip

    def fill(copy: int) -> None:
        cache = caches[copy]
        for fills in batch.fills:
            prior_rows = batch.prior_rows(cache)
            fill_scratch(cache, layout, k, v, fills, batch.touched, prior_rows, workspace)

    def store(copy: int) -> None:
        cache = caches[copy]
        append(cache, layout, k, v, batch.touched, count, batch.prior_rows(cache))

    return {"ours": attend, "fill": fill, "append": store}


def _bf16_inputs(fresh: int, prefix: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """q, and copies of a cache [pages, 2, PAGE_SIZE, heads, head_dim]."""
    shape = (-(-(prefix + fresh) // PAGE_SIZE), 2, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
    caches = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(COPIES)]
    q = torch.randn((fresh, NUM_KV_HEADS * GQA, HEAD_DIM), device="cuda", dtype=torch.bfloat16)
    return q, caches


def fa3_call(fresh: int, prefix: int) -> Callable[[int], Any]:
    """SGLang's FlashAttention-3 over bf16 pages of 64 tokens, called as SGLang does."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    q, caches = _bf16_inputs(fresh, prefix)
    pages = torch.randperm(len(caches[0]), device="cuda").int()[None]
    lens = torch.tensor([prefix + fresh], dtype=torch.int32, device="cuda")
    cu_seqlens_q = torch.tensor([0, fresh], dtype=torch.int32, device="cuda")
    out = torch.empty_like(q)
    return lambda copy: flash_attn_with_kvcache(
        q, *caches[copy].unbind(1), cache_seqlens=lens, page_table=pages,
        cu_seqlens_q=cu_seqlens_q, max_seqlen_q=fresh, causal=True, out=out,
    )  # fmt: skip


def fa2_call(fresh: int, prefix: int) -> Callable[[int], Any]:
    """FlashInfer's fa2 over bf16 pages of 64 tokens."""
    import flashinfer

    q, caches = _bf16_inputs(fresh, prefix)
    num_pages = len(caches[0])
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device="cuda")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(384 * 2**20, dtype=torch.uint8, device="cuda"), "NHD", backend="fa2"
    )
    wrapper.plan(
        torch.tensor([0, fresh], dtype=torch.int32),
        torch.tensor([0, num_pages], dtype=torch.int32),
        torch.randperm(num_pages, device="cuda").int(),
        torch.tensor([(prefix + fresh - 1) % PAGE_SIZE + 1], dtype=torch.int32),
        NUM_KV_HEADS * GQA, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, causal=True,
        q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )  # fmt: skip
    return lambda copy: wrapper.run(q, caches[copy], out=out, lse=lse, return_lse=True)


def measure(
    formats: list[str], fresh: int, prefix: int, libraries: list[str], max_pages: int
) -> list[dict[str, Any]]:
    """Rows of one shape."""
    rows = []
    baselines = {"bf16_fa2": fa2_call(fresh, prefix)}
    if "fa3" in libraries:
        baselines["bf16_fa3"] = fa3_call(fresh, prefix)
    for name in formats:
        for mode in ("exact", "quantized"):
            for library in libraries:
                calls = ours(name, fresh, prefix, mode == "quantized", max_pages, library)
                times = time_interleaved(calls | baselines, COPIES, rounds=12)
                us = times["ours"].p50
                best = min(times[baseline].p50 for baseline in baselines)
                row: dict[str, Any] = {
                    "format": name, "mode": mode, "library": library, "fresh": fresh,
                    "prefix": prefix, "scratch_pages": max_pages, "us_p20": times["ours"].p20,
                    "us_p50": us, "us_p80": times["ours"].p80, "us_fill": times["fill"].p50,
                    "us_append": times["append"].p50,
                }  # fmt: skip
                row |= {f"us_{baseline}": times[baseline].p50 for baseline in baselines}
                row = {k: round(x, 1) if isinstance(x, float) else x for k, x in row.items()}
                rows.append(row | {"x_bf16": round(best / us, 3)})
                del calls
                torch.cuda.empty_cache()
    print(tabulate(rows, headers="keys"), flush=True)
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="FRESHxPREFIX")
    is_hopper = torch.cuda.get_device_capability()[0] == HOPPER
    parser.add_argument(
        "--libraries",
        nargs="+",
        choices=list(LIBRARIES),
        default=["fa3"] if is_hopper else ["fa2"],
        help="of our 16-bit attention (default: the device's)",
    )
    parser.add_argument("--scratch-pages", type=int, default=0, help="0: as the server")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/h200/extend.csv"))
    args = parser.parse_args()
    torch.manual_seed(0)
    max_pages = args.scratch_pages or scratch_pages(NUM_KV_HEADS, HEAD_DIM, "cuda")
    rows = []
    for shape in args.shapes:
        fresh, prefix = map(int, shape.split("x"))
        rows += measure(args.formats, fresh, prefix, args.libraries, max_pages)
        write_results(args.out, rows)


if __name__ == "__main__":
    main()
