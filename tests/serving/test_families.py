"""Model families beside the demo's, with random weights, in both 16-bit types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sgl_kvq.errors import KvqError
from tests.support.hf_oracle import oracle_logprobs
from tests.support.model_folders import FAMILIES, make_model

PROMPT, NEW_TOKENS = 200, 70
ROUNDING = {torch.bfloat16: 0.05, torch.float16: 0.02}  # mean; measured 0.025 and 0.008

ALWAYS = ("llama-mha-float16", "qwen3-float16", "qwen3-moe-float16")
HALF = (
    *(
        "llama-mha",
        "apertus",
        "cohere",
        "ernie4.5-moe",
        "gemma",
        "glm4-moe",
        "granite",
        "minimax-m2",
    ),
    *("olmo2", "olmoe", "phi3", "qwen3", "qwen3-moe", "smollm3", "starcoder2"),
)
CASES = {
    f"{family}-{'float16' if family in HALF else 'bfloat16'}": (
        family,
        torch.float16 if family in HALF else torch.bfloat16,
    )
    for family in FAMILIES
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in ALWAYS else pytest.mark.long) for case in CASES],
)
def test_family_matches_the_oracle(
    case: str,
    model_path: str,
    text_ids: list[int],
    tmp_path: Path,
    start_scheduler: Callable[..., Any],
) -> None:
    """Pages of 16 bits equal a float32 forward up to rounding; pages of 2 bits its 2-bit twin.

    With random weights a code that rounds the other way moves logprobs visibly, so 2 bits are
    compared with what they are not: the unquantized forward is several times further away.
    """
    family, dtype = CASES[case]
    make_model(tmp_path, model_path, family, dtype)
    prompt = text_ids[:PROMPT]
    for name, other in (("bf16", "hack2"), ("hack2", "bf16")):
        harness = start_scheduler(
            str(tmp_path),
            kv_quant=name,
            kv_quant_prefill="quantized",
            kv_quant_memory_gb=0.02,
            max_running_requests=2,
        )
        served_by = type(harness.scheduler.tp_worker.model_runner.model).__name__
        assert served_by == FAMILIES[family].served_class
        assert harness.pool.layout.row_dtype == dtype
        (result,) = harness.generate([prompt], NEW_TOKENS, input_logprobs=True)
        served = torch.tensor(result.input_logprobs + result.output_logprobs)
        sequence = prompt + result.output_ids
        found, wrong = (
            (served - oracle_logprobs(tmp_path, sequence, fmt).logprobs).abs()
            for fmt in (name, other)
        )
        assert found[:63].mean() < ROUNDING[dtype]  # page 0 is 16 bits for everybody
        assert wrong[64:].mean() > 5 * ROUNDING[dtype]
        limit = ROUNDING[dtype] if name == "bf16" else 0.45 * wrong[64:].mean()
        for part in (found[64:PROMPT], found[PROMPT:]):  # extend, decode
            assert part.mean() < limit


@pytest.mark.long
def test_a_factor_on_scores_that_changes_is_no_wrong_answer(
    model_path: str, text_ids: list[int], tmp_path: Path, start_scheduler: Callable[..., Any]
) -> None:
    """Hugging Face models in SGLang tell their attention the factor at each call."""
    make_model(tmp_path, model_path, "smollm3", torch.bfloat16)
    harness = start_scheduler(str(tmp_path), kv_quant="hack4", kv_quant_memory_gb=0.02)
    model = harness.scheduler.tp_worker.model_runner.model
    for module in model.modules():
        if hasattr(module, "scaling"):
            module.scaling *= 2
    with pytest.raises(KvqError, match=r"by 0\.25, by 0\.125 when"):
        harness.generate([text_ids[:80]], 2)
