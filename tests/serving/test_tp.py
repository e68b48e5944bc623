"""Two ranks serve what one does: heads shared out, and a KV head that both ranks hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.serving.random_bases import random_bases
from sgl_kvq.formats.calibration import LayerBasis, save_bases
from tests.support.compare import logprob_differences
from tests.support.model_folders import make_model
from tests.support.ranks import run_ranks
from tests.support.scheduler import Result, SchedulerHarness

LENGTHS = (450, 64, 333, 1)
NEW_TOKENS = 70
BUDGET = 0.2  # logprobs: partial sums of two ranks are rounded to bfloat16 before they are added
MEAN_BUDGET = 0.03
TIE_BUDGET = 10.0  # 2 bits amplify roundings: texts may part anywhere
OPTIONS = {
    "kv_quant_prefill": "quantized",
    "kv_quant_memory_gb": 0.02,
    "chunked_prefill_size": 256,
    "max_running_requests": 3,
}

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
    make_shared_model(tmp_path, model_path, num_kv_heads)
    prompts = make_prompts(text_ids)
    options = {"kv_quant": name, **OPTIONS}
    (alone,) = run_ranks(1, serve, str(tmp_path), options, prompts)
    ranks = run_ranks(2, serve, str(tmp_path), options, prompts)
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


def test_each_rank_takes_its_own_bases_from_a_file(
    model_path: str, text_ids: list[int], tmp_path: Path
) -> None:
    """Codes in another head's basis err otherwise: as far from one rank's logprobs as `swapped`."""
    make_shared_model(tmp_path / "model", model_path, num_kv_heads=2)
    bases = random_bases(num_layers=2, num_kv_heads=2, head_dim=64)
    swapped = [LayerBasis(basis.k.flip(0), basis.v.flip(0)) for basis in bases]
    for name, layers in (("own", bases), ("swapped", swapped)):
        save_bases(tmp_path / f"{name}.safetensors", layers, {})
    prompts, served = make_prompts(text_ids)[:2], {}
    for tp_size, name in ((1, "own"), (1, "swapped"), (2, "own")):
        file = str(tmp_path / f"{name}.safetensors")
        options = {"kv_quant": "kvq2", "kv_quant_config": file, **OPTIONS}
        results = run_ranks(tp_size, serve, str(tmp_path / "model"), options, prompts)
        assert all(result["held"] == (0, 0, 0) for result in results)
        served[tp_size, name] = results[0]["first"]
    near, far = (
        logprob_differences(served[key], served[1, "own"], TIE_BUDGET)
        for key in ((2, "own"), (1, "swapped"))
    )
    print(f"kvq2, two ranks: mean {near.mean():.4f}, swapped heads {far.mean():.4f}")
    assert near.mean() < 0.3 * far.mean()


def make_shared_model(folder: Path, model_path: str, num_kv_heads: int) -> None:
    """A model whose heads two ranks can share out."""
    make_model(
        folder,
        model_path,
        "llama",
        torch.bfloat16,
        num_attention_heads=8,
        num_key_value_heads=num_kv_heads,
        head_dim=64,
        initializer_range=0.05,
    )


def make_prompts(text_ids: list[int]) -> list[list[int]]:
    return [text_ids[i * 700 : i * 700 + n] for i, n in enumerate(LENGTHS)]


def serve(
    rank: int, tp: dict[str, Any], model_path: str, options: dict[str, Any], prompts: Any
) -> dict[str, Any]:
    """What a rank serves."""
    harness = SchedulerHarness(model_path, tp_rank=rank, **tp, **options)
    pool, allocator, tree = harness.pool, harness.allocator, harness.scheduler.tree_cache
    first: list[Result] = harness.generate(prompts, NEW_TOKENS, input_logprobs=True)
    hits = harness.generate(prompts, NEW_TOKENS)
    leaked = pool.plan.num_tokens - allocator.available_size() - tree.evictable_size()
    held = (pool.open_slots.num_used(), leaked, int(pool.num_nonfinite))
    return {"first": first, "hits": hits, "held": held, "heads": pool.layout.num_kv_heads}
