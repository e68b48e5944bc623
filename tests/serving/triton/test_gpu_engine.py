"""The GPU engine inside SGLang's scheduler, its kernels interpreted on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sgl_kvq.attention import cpu
from sgl_kvq.attention.gpu import GpuEngine
from sgl_kvq.formats.base import LayerBits
from sgl_kvq.formats.calibration import BitAllocation, default_basis, save_bases
from tests.support.compare import logprob_differences
from tests.support.model_folders import make_model
from tests.support.torch_attention import TorchAttention

LENGTHS = (62, 130)
NEW_TOKENS = 4  # the first request's page is full before its end
# Logprobs: bfloat16 is rounded elsewhere, by the interpreter truncated; a flipped code moved 0.6.
BUDGET = 0.8


@pytest.mark.parametrize(
    ("name", "prefill", "other", "chosen"),
    [
        ("hack2", "exact", "bf16", None),
        ("kvq2", "quantized", "hack2", None),
        ("kvq2", "quantized", "hack2", [LayerBits(2, 4, 2), LayerBits(4, 5, 4)]),
        pytest.param("saw4", "quantized", "hack2", None, marks=pytest.mark.long),
    ],
    ids=["hack2", "kvq2", "kvq2-by-layer", "saw4"],
)
def test_it_serves_what_the_cpu_engine_does(
    name: str,
    prefill: str,
    other: str,
    chosen: list[LayerBits] | None,
    device: str,
    model_path: str,
    text_ids: list[int],
    tmp_path: Path,
    start_scheduler: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunks, a batch of decode steps that closes a page, and a hit of cached pages."""
    if device != "cpu":
        pytest.skip("tests/serving/test_gpu.py does this with compiled kernels")
    make_model(tmp_path, model_path, "llama", torch.bfloat16)
    file = tmp_path / "kvq.safetensors" if chosen else None
    if file is not None and chosen is not None:
        save_bases(file, [default_basis(64, 2)] * 2, {}, BitAllocation(name, chosen))
    prompts = [text_ids[i * 300 : i * 300 + n] for i, n in enumerate(LENGTHS)]

    def serve(kv_format: str) -> list[Any]:
        harness = start_scheduler(
            str(tmp_path),
            kv_quant=kv_format,
            kv_quant_prefill=prefill,
            kv_quant_config=str(file) if file is not None and kv_format == name else None,
            kv_quant_memory_gb=0.02,
            chunked_prefill_size=128,
            max_running_requests=3,
        )
        results = harness.generate(prompts, NEW_TOKENS, input_logprobs=True)
        results += harness.generate(prompts[1:], 1)
        if kv_format == name:
            assert len(set(harness.pool.plan.layouts)) == (1 if chosen is None else 2)
        assert harness.pool.open_slots.num_used() == 0
        assert int(harness.pool.num_nonfinite) == 0
        return results

    expected, wrong = serve(name), serve(other)
    engine = partial(GpuEngine, make_attention=TorchAttention)
    monkeypatch.setattr(cpu, "CpuEngine", engine)
    found = serve(name)
    assert [r.cached_tokens for r in found] == [r.cached_tokens for r in expected] == [0, 0, 128]
    near, far = (logprob_differences(found, results, 10.0) for results in (expected, wrong))
    print(f"{name}: mean {near.mean():.1e}, {other} {far.mean():.1e}")
    assert near.max() < BUDGET
    assert near.mean() < 0.2 * far.mean()
