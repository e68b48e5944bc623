"""Two ranks serve what one does: heads shared out, and a KV head that both ranks hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from testbed.servers import free_port
from tests.support.compare import logprob_differences
from tests.support.model_folders import make_model
from tests.support.scheduler import Result, SchedulerHarness

LENGTHS = (450, 64, 333, 1)
NEW_TOKENS = 70
BUDGET = 0.2  # logprobs: partial sums of two ranks are rounded to bfloat16 before they are added
MEAN_BUDGET = 0.03

pytestmark = [
    pytest.mark.long,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs"),
]


@pytest.mark.parametrize(
    ("name", "num_kv_heads"),
    [("hack4", 2), ("bf16", 2), ("bf16", 1), ("hack4", 1)],
)
def test_two_ranks_equal_one(
    name: str, num_kv_heads: int, model_path: str, text_ids: list[int], tmp_path: Path
) -> None:
    if num_kv_heads == 1 and not torch.cuda.is_available():
        pytest.skip("needs GPUs: on a CPU, SGLang pads KV heads instead of replicating them")
    make_model(
        tmp_path,
        model_path,
        "llama",
        torch.bfloat16,
        num_attention_heads=8,
        num_key_value_heads=num_kv_heads,
        head_dim=64,
        initializer_range=0.05,
    )
    prompts = [text_ids[i * 700 : i * 700 + n] for i, n in enumerate(LENGTHS)]
    options = {
        "kv_quant": name,
        "kv_quant_prefill": "quantized",
        "kv_quant_memory_gb": 0.02,
        "chunked_prefill_size": 256,
        "max_running_requests": 3,
    }
    (alone,) = serve(1, str(tmp_path), options, prompts)
    ranks = serve(2, str(tmp_path), options, prompts)
    for served in (alone, *ranks):
        assert served["held"] == (0, 0, 0)
    assert [r.output_ids for r in ranks[0]["first"]] == [r.output_ids for r in ranks[1]["first"]]
    assert {served["heads"] for served in ranks} == {1}
    assert alone["heads"] == num_kv_heads
    for round_name in ("first", "hits"):
        found = logprob_differences(ranks[0][round_name], alone[round_name], BUDGET)
        print(f"{name}, {num_kv_heads} KV heads, {round_name}: mean {found.mean():.4f}")
        assert found.max() < BUDGET
        assert found.mean() < MEAN_BUDGET
    assert sum(r.cached_tokens for r in ranks[0]["hits"]) == 448 + 320


def serve(
    tp_size: int, model_path: str, options: dict[str, Any], prompts: list[list[int]]
) -> list[dict[str, Any]]:
    """Run all ranks to the end; what each served."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    options = {**options, "tp_size": tp_size, "nccl_port": free_port()}
    ranks = torch.multiprocessing.spawn(
        _rank, (model_path, options, prompts, results), nprocs=tp_size, join=False
    )
    served = {}
    while not ranks.join(timeout=1):
        while not results.empty():
            rank, found = results.get()
            served[rank] = found
    while not results.empty():
        rank, found = results.get()
        served[rank] = found
    return [served[rank] for rank in range(tp_size)]


def _rank(
    rank: int, model_path: str, options: dict[str, Any], prompts: list[list[int]], results: Any
) -> None:
    if not torch.cuda.is_available():  # SGLang asks for cores, and uses NCCL if it finds one
        cores = "|".join(str(core) for core in range(options["tp_size"]))
        os.environ |= {"SGLANG_CPU_OMP_THREADS_BIND": cores, "SGLANG_NCCL_SO_PATH": "/none"}
    harness = SchedulerHarness(model_path, tp_rank=rank, **options)
    pool, allocator, tree = harness.pool, harness.allocator, harness.scheduler.tree_cache
    first: list[Result] = harness.generate(prompts, NEW_TOKENS, input_logprobs=True)
    hits = harness.generate(prompts, NEW_TOKENS)
    leaked = pool.plan.num_tokens - allocator.available_size() - tree.evictable_size()
    held = (pool.open_slots.num_used(), leaked, int(pool.num_nonfinite))
    heads = pool.layout.num_kv_heads
    results.put((rank, {"first": first, "hits": hits, "held": held, "heads": heads}))
