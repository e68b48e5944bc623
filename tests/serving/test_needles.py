"""Thirty questions about numbers hidden in texts of up to 8,000 tokens that prompts share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.fidelity.needle import CITIES, needle_texts

CONTEXTS = (2048, 4096, 8100)
TOLERANCE = 3
# Whole numbers that the CPU server gives greedily, of 30 (bfloat16, quantized prefill).
HITS = {"bf16": 0, "hack4": 0, "hack2": 0, "kvq4": 0, "kvq2": 0}


@pytest.mark.long
@pytest.mark.parametrize("name", HITS)
def test_needles_behind_shared_prefixes(
    name: str, model_path: str, start_scheduler: Callable[..., Any]
) -> None:
    """As many are found as on a CPU, alone in the prompt and again from cached pages."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    prompts, answers = [], []
    for context in CONTEXTS:
        (text,) = needle_texts(tokenizer, context, 1)
        questions = [
            tokenizer(f"\n\nThe secret number of {city} is", add_special_tokens=False)["input_ids"]
            for city in CITIES
        ]
        haystack = text.ids[: text.answers[0].start - len(questions[0])].tolist()
        prompts += [haystack + question for question in questions]
        answers += [text.ids[answer].tolist() for answer in map(torch.tensor, text.answers)]
    harness = start_scheduler(
        model_path,
        kv_quant=name,
        kv_quant_prefill="quantized",
        kv_quant_memory_gb=0.6,
        chunked_prefill_size=2048,
        max_running_requests=8,
    )
    for number in range(2):
        results = harness.generate(prompts, 6)
        hits = sum(
            result.output_ids[: len(answer)] == answer
            for result, answer in zip(results, answers, strict=True)
        )
        cached = sum(result.cached_tokens for result in results)
        print(f"{name}: {hits} of {len(prompts)}, {cached} prompt tokens cached")
        assert abs(hits - HITS[name]) <= TOLERANCE
        whole_pages = [len(prompt) // 64 * 64 for prompt in prompts]
        assert cached > (0.8, 0.99)[number] * sum(whole_pages)
    assert harness.pool.open_slots.num_used() == 0
