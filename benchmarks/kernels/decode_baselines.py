"""16-bit and fp8 decode kernels that users run without `--kv-quant`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.kernels.harness import num_copies, time_interleaved

Call = tuple[Callable[[int], Any], int]
"""A call on one of several copies of its input, and the number of copies."""

FLASHINFER_PAGES = (16, 64)
FA3_PAGES = (1, 64, 128)


def baselines(shape: tuple[int, ...], is_hopper: bool) -> dict[str, Call]:
    """Calls by column, each at its faster page size.

    Args:
        shape: batch, length, KV heads, query heads of one, head_dim.
        is_hopper: Whether FlashAttention-3 runs here.
    """
    found = {
        "bf16": _faster(flashinfer_call, FLASHINFER_PAGES, shape, fp8=False),
        "fp8": _faster(flashinfer_call, FLASHINFER_PAGES, shape, fp8=True),
    }
    if is_hopper:
        found["fa3"] = _faster(fa3_call, FA3_PAGES, shape, fp8=False)
        found["fa3_fp8"] = _faster(fa3_call, FA3_PAGES, shape, fp8=True)
    return found


def _faster(
    make: Callable[..., Call], page_sizes: tuple[int, ...], shape: tuple[int, ...], fp8: bool
) -> Call:
    times = {}
    for page in page_sizes:
        call, copies = make(*shape, page=page, fp8=fp8)
        times[page] = time_interleaved({"x": call}, copies, rounds=8)["x"].p50
        del call
        torch.cuda.empty_cache()
    return make(*shape, page=min(times, key=lambda page: times[page]), fp8=fp8)


def _caches(
    batch: int, pages: int, page: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Copies of [pages, 2, page, heads, head_dim], more than the L2 cache holds."""
    shape = (batch * pages, 2, page, num_kv_heads, head_dim)
    copies = num_copies(batch * pages * 2 * page * num_kv_heads * head_dim * dtype.itemsize)
    return [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(dtype) for _ in range(copies)
    ]


def fa3_call(
    batch: int, length: int, num_kv_heads: int, gqa: int, head_dim: int, page: int, fp8: bool
) -> Call:
    """SGLang's FlashAttention-3, called as its decode does; fp8 queries with an fp8 cache."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    pages = -(-length // page)
    caches = _caches(batch, pages, page, num_kv_heads, head_dim, dtype)
    ints: dict[str, Any] = {"dtype": torch.int32, "device": "cuda"}
    q = torch.randn((batch, num_kv_heads * gqa, head_dim), device="cuda", dtype=torch.bfloat16)
    scales = torch.ones((batch, num_kv_heads), device="cuda") if fp8 else None
    options: dict[str, Any] = {
        "cache_seqlens": torch.full((batch,), length, **ints),
        "page_table": torch.randperm(batch * pages, device="cuda").int().view(batch, pages),
        "cu_seqlens_q": torch.arange(batch + 1, **ints),
        "max_seqlen_q": 1,
        "causal": True,
        "k_descale": scales,
        "v_descale": scales,
    }
    q = q.to(dtype)
    return lambda copy: flash_attn_with_kvcache(q, *caches[copy].unbind(1), **options), len(caches)


def flashinfer_call(
    batch: int, length: int, num_kv_heads: int, gqa: int, head_dim: int, page: int, fp8: bool
) -> Call:
    """FlashInfer's paged decode on tensor cores."""
    import flashinfer

    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    pages = -(-length // page)
    caches = _caches(batch, pages, page, num_kv_heads, head_dim, dtype)
    q = torch.randn((batch, num_kv_heads * gqa, head_dim), device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(q)
    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32) * pages,
        torch.randperm(batch * pages, device="cuda").int(),
        torch.full((batch,), (length - 1) % page + 1, dtype=torch.int32),
        num_kv_heads * gqa, num_kv_heads, head_dim, page,
        q_data_type=torch.bfloat16, kv_data_type=dtype,
    )  # fmt: skip
    return lambda copy: wrapper.run(q, caches[copy], out=out), len(caches)
