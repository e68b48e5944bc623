"""Served logprobs equal an independent transformers forward with fake-quantized KV.

Rounding decides codes, and a code that rounds the other way moves what every later layer rounds:
two correct float32 programs drift apart by as much as rounding itself costs. So every format is
compared sharply on the first three layers of the real model, where that has not happened yet, and
the whole model is compared against how far the oracle drifts from itself (float32 to float64).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sgl_kvq.formats.registry import format_names
from tests.support.hf_oracle import FORMATS, oracle_logprobs

SHORT, LONG, DECODED, DECODED_LONG = 330, 2150, 70, 3000
ALWAYS = ("hack4", "k4v2", "saw4", "bf16")  # and hack2, past 2,000 tokens

pytestmark = pytest.mark.usefixtures("cpu")


def serve(
    start: Callable[..., Any],
    model_path: str,
    name: str,
    prompt: list[int],
    decoded: int,
    **more: Any,
) -> tuple[Any, list[int]]:
    """One request; returns its result and the whole sequence."""
    harness = start(
        model_path,
        kv_quant=name,
        kv_quant_memory_gb=0.12,
        chunked_prefill_size=256,
        max_running_requests=2,
        dtype="float32",
        **more,
    )
    (result,) = harness.generate([prompt], decoded, input_logprobs=True)
    return result, prompt + result.output_ids


def difference(logprobs: list[float], oracle: torch.Tensor) -> torch.Tensor:
    return (torch.tensor(logprobs) - oracle).abs()


@pytest.mark.parametrize(
    ("name", "length", "decoded"),
    [
        ("hack2", LONG, DECODED),
        *((name, SHORT, DECODED) for name in ALWAYS),
        *(
            pytest.param(name, LONG, DECODED, marks=pytest.mark.long)
            for name in format_names()
            if name in FORMATS and name != "hack2"
        ),
        pytest.param("hack4", SHORT, DECODED_LONG, marks=pytest.mark.long),
        pytest.param("hack2", SHORT, DECODED_LONG, marks=pytest.mark.long),
    ],
)
def test_prefill_and_decode(
    name: str,
    length: int,
    decoded: int,
    short_model_path: str,
    text_ids: list[int],
    start_scheduler: Callable[..., Any],
) -> None:
    """Input logprobs check extend, output logprobs check decode, both over closed pages."""
    prompt = text_ids[:length]
    result, sequence = serve(
        start_scheduler, short_model_path, name, prompt, decoded, kv_quant_prefill="quantized"
    )
    oracle = oracle_logprobs(short_model_path, sequence, name).logprobs
    for found in (
        difference(result.input_logprobs, oracle[: length - 1]),
        difference(result.output_logprobs, oracle[length - 1 :]),
    ):
        assert found.mean() < 3e-3
        assert found.quantile(0.99) < 0.05
    # The oracle can tell formats apart: another one is an order of magnitude further away.
    other = "hack4" if name in ("hack2", "kivi2") else "hack2"
    wrong = oracle_logprobs(short_model_path, sequence, other).logprobs
    assert difference(result.input_logprobs, wrong[: length - 1]).mean() > 0.01


@pytest.mark.parametrize("length", [SHORT, pytest.param(LONG, marks=pytest.mark.long)])
def test_the_whole_model_drifts_no_further_than_the_oracle_itself(
    length: int, model_path: str, text_ids: list[int], start_scheduler: Callable[..., Any]
) -> None:
    name, prompt = "hack2", text_ids[:length]
    result, sequence = serve(
        start_scheduler, model_path, name, prompt, 4, kv_quant_prefill="quantized"
    )
    single = oracle_logprobs(model_path, sequence, name).logprobs[: length - 1]
    double = oracle_logprobs(model_path, sequence, name, dtype=torch.float64).logprobs
    drift = (single - double[: length - 1]).abs().mean()
    found = difference(result.input_logprobs, single)
    assert found.mean() < 1.5 * drift
    # Drift has no direction: the mean logprob, which is the perplexity, stays.
    shift = (torch.tensor(result.input_logprobs) - single).mean().abs()
    assert shift < 5 * found.std() / len(found) ** 0.5
    # Before the first code is read the two agree; page 0 is 16 bits for everybody.
    assert difference(result.input_logprobs[:60], single[:60]).mean() < 0.01
