"""`--kv-quant-prefill quantized`: the result is a function of the token sequence alone.

Checked with the real model's first layers in float64: there two ways of computing the same thing
differ by 1e-15, far too little to round a 16-bit row or a code the other way, so any difference is
one of logic. (In bfloat16 and float32 such a flip happens now and then, and 2-bit codes amplify
it.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.compare import logprob_differences

NEW_TOKENS = 12
LENGTHS = (450, 333, 64, 120)
BUDGET = 1e-4  # logprobs come back in float32

pytestmark = pytest.mark.usefixtures("cpu")


def assert_same(results: list[Any], expected: list[Any]) -> None:
    assert logprob_differences(results, expected, BUDGET).max() < BUDGET


def test_chunks_hits_batches_and_retraction(
    short_model_path: str,
    text_ids: list[int],
    start_scheduler: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = [text_ids[i * 1100 : i * 1100 + n] for i, n in enumerate(LENGTHS)]
    harness = start_scheduler(
        short_model_path,
        kv_quant="hack2",
        kv_quant_prefill="quantized",
        kv_quant_memory_gb=0.15,
        chunked_prefill_size=512,
        max_running_requests=8,
        dtype="float32",
    )

    harness.scheduler.tp_worker.model_runner.model.double()

    def one_by_one() -> list[Any]:
        harness.flush()
        return [harness.generate([p], NEW_TOKENS, input_logprobs=True)[0] for p in prompts]

    baseline = one_by_one()

    # Cache hits. (Asking for input logprobs makes SGLang skip the radix tree.)
    hits = harness.generate(prompts, NEW_TOKENS)
    assert [r.cached_tokens for r in hits] == [(n - 1) // 64 * 64 for n in LENGTHS]
    assert_same(hits, baseline)

    # All at once.
    harness.flush()
    assert_same(harness.generate(prompts, NEW_TOKENS, input_logprobs=True), baseline)

    # Other chunk sizes; the number of forwards shows that they took effect.
    for chunk in (64, 128, 8192):
        monkeypatch.setattr(harness.scheduler, "chunked_prefill_size", chunk)
        before = harness.scheduler.forward_ct
        assert_same(one_by_one(), baseline)
        prefills = harness.scheduler.forward_ct - before - len(LENGTHS) * (NEW_TOKENS - 1)
        assert prefills == sum(-(-n // chunk) for n in LENGTHS)
    monkeypatch.setattr(harness.scheduler, "chunked_prefill_size", 512)

    # Forced retraction: pages are freed in the middle of decoding and prefilled again.
    from sglang.srt.managers import scheduler as scheduler_module

    harness.flush()
    retracted = count_retractions(harness, monkeypatch)
    monkeypatch.setattr(scheduler_module, "TEST_RETRACT", True)
    monkeypatch.setattr(scheduler_module, "TEST_RETRACT_INTERVAL", 5)
    assert_same(harness.generate(prompts, NEW_TOKENS), baseline)
    assert len(retracted) >= 2


def count_retractions(harness: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    from sglang.srt.managers.schedule_batch import ScheduleBatch

    retracted: list[Any] = []
    original = ScheduleBatch.retract_decode

    def wrapped(batch: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(batch, *args, **kwargs)
        retracted.extend(result[0])
        return result

    monkeypatch.setattr(ScheduleBatch, "retract_decode", wrapped)
    return retracted
