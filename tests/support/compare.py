"""Compare what two schedulers served."""

from __future__ import annotations

import torch

from tests.support.scheduler import Result


def logprob_differences(
    results: list[Result], expected: list[Result], tie_budget: float
) -> torch.Tensor:
    """|logprob - expected logprob| of prompts and outputs, one after the other.

    Texts may part only where the expected run's two best tokens are closer than `tie_budget`;
    outputs are compared up to there.
    """
    differences = []
    for result, reference in zip(results, expected, strict=True):
        if result.input_logprobs is not None and reference.input_logprobs is not None:
            pair = torch.tensor([result.input_logprobs, reference.input_logprobs])
            differences.append((pair[0] - pair[1]).abs())
        same = _steps_until_they_part(result, reference, tie_budget)
        pair = torch.tensor([result.output_logprobs[:same], reference.output_logprobs[:same]])
        differences.append((pair[0] - pair[1]).abs())
    return torch.cat(differences)


def _steps_until_they_part(result: Result, reference: Result, tie_budget: float) -> int:
    steps = zip(result.output_ids, reference.output_ids, reference.top, strict=True)
    for step, (ours, theirs, ((best, _), (second, _))) in enumerate(steps):
        if ours != theirs:
            assert best - second < tie_budget, f"parted at step {step} without a near tie"
            return step
    return len(reference.output_ids)
