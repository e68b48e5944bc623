"""Thirty questions about numbers hidden in texts of up to 8,000 tokens that prompts share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.fidelity.needle import NeedleText, needle_texts
from sgl_kvq.fidelity.history import FormatHistory
from sgl_kvq.fidelity.teacher import Teacher

CONTEXTS = (2048, 4096, 8100)
# Needles that may be found by the server alone or by the reference alone: rounding flips codes.
DIFFERENT = {"bf16": 2, "hack4": 4, "kvq4": 4, "hack2": 8, "kvq2": 8}


@pytest.mark.long
@pytest.mark.parametrize("name", DIFFERENT)
def test_needles_behind_shared_prefixes(
    name: str, model_path: str, start_scheduler: Callable[..., Any]
) -> None:
    """The server finds what a float32 forward over the same codes finds, cold and from its cache.

    A text ends with ten questions and their answers; the prompts are the text up to each answer.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    texts = [text for context in CONTEXTS for text in needle_texts(tokenizer, context, 1)]
    teacher = Teacher(model_path)
    history = FormatHistory(name, teacher.model.config)
    expected = torch.cat([found_by(teacher, history, text) for text in texts])
    del teacher
    harness = start_scheduler(
        model_path,
        kv_quant=name,
        kv_quant_prefill="quantized",
        kv_quant_memory_gb=0.6,
        chunked_prefill_size=2048,
        max_running_requests=8,
    )
    prompts = [text.ids[: answer.start].tolist() for text in texts for answer in text.answers]
    answers = [text.ids[list(answer)].tolist() for text in texts for answer in text.answers]
    for share in (0.8, 0.99):  # of the prompts' whole pages: one text is computed once, then none
        results = harness.generate(prompts, max(map(len, answers)))
        found = torch.tensor(
            [
                result.output_ids[: len(answer)] == answer
                for result, answer in zip(results, answers, strict=True)
            ]
        )
        both = f"{int(found.sum())} of 30 found, the reference finds {int(expected.sum())}"
        print(f"{name}: {both}, {int((found != expected).sum())} differ")
        assert (found != expected).sum() <= DIFFERENT[name]
        cached = sum(result.cached_tokens for result in results)
        assert cached >= share * sum((len(prompt) - 1) // 64 * 64 for prompt in prompts)
    assert harness.pool.open_slots.num_used() == 0


def found_by(teacher: Teacher, history: FormatHistory, text: NeedleText) -> torch.Tensor:
    """bool [needles]: whether the model's greedy answer is the number."""
    hidden = teacher.hidden(text.ids, history)
    found = []
    for answer in text.answers:
        rows = hidden[answer.start - 1 : answer.stop - 1]
        best = torch.cat(list(teacher.logprobs(rows))).argmax(-1)
        found.append(torch.equal(best, text.ids[list(answer)]))
    return torch.tensor(found)
