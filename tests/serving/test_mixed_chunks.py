"""`--enable-mixed-chunk`: decode tokens ride in a prefill batch, and the answer stays the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sgl_kvq.formats.base import PAGE_SIZE

NEW_TOKENS = 150  # two pages close while the other prompts arrive

pytestmark = pytest.mark.usefixtures("cpu")


def test_answers_are_those_of_separate_batches(
    short_model_path: str,
    text_ids: list[int],
    start_scheduler: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang.srt.managers.schedule_batch import ScheduleBatch

    prompts = [text_ids[i * 1100 : i * 1100 + n] for i, n in enumerate((110, 45, 1000, 1063))]
    harness = start_scheduler(
        short_model_path,
        kv_quant="hack2",
        kv_quant_prefill="quantized",
        kv_quant_memory_gb=0.15,
        chunked_prefill_size=128,  # 64 for the prompt: SGLang takes the decode tokens off
        enable_mixed_chunk=True,
        max_running_requests=4,
        dtype="float32",
    )
    harness.scheduler.tp_worker.model_runner.model.double()
    free = harness.allocator.available_size()
    alone = [harness.generate([prompt], NEW_TOKENS)[0].output_ids for prompt in prompts]

    mixed: list[int] = []  # decode tokens of a batch
    closed: list[int] = []  # pages that they fill
    original = ScheduleBatch.mix_with_running

    def counted(batch: Any, running: Any, *args: Any) -> Any:
        mixed.append(len(running.reqs))
        closed.append(int((running.seq_lens_cpu % PAGE_SIZE == 0).sum()))
        return original(batch, running, *args)

    monkeypatch.setattr(ScheduleBatch, "mix_with_running", counted)
    harness.flush()
    rids = []
    for prompt in prompts:
        rids.append(harness.submit(prompt, NEW_TOKENS, logprobs=False))
        for _ in range(6):  # the first ones decode when the next ones arrive
            harness.step()
    harness.run()
    assert sum(mixed) > 40
    assert sum(closed) > 1
    assert [harness.result(rid).output_ids for rid in rids] == alone
    harness.flush()
    assert harness.allocator.available_size() == free
