"""Perplexity, KL divergence and top-1 agreement against 16 bits, with confidence intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sgl_kvq.fidelity.history import FormatHistory
from sgl_kvq.fidelity.loss import compare
from sgl_kvq.fidelity.teacher import Teacher

BLOCK_TOKENS = 128  # neighbouring tokens depend on each other, so whole blocks are drawn
DRAWS = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Scores:
    """Per-token scores, each float32 [tokens].

    Args:
        nll: Negative log-probability of the text's next token, nats.
        ref_nll: Likewise of the model with 16-bit KV.
        kl: KL divergence of the two next-token distributions from 16 bits, nats.
        agrees: 1 where both find the same token most likely.
    """

    nll: torch.Tensor
    ref_nll: torch.Tensor
    kl: torch.Tensor
    agrees: torch.Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean with a confidence interval."""

    value: float
    low: float
    high: float

    def map(self, function: object) -> Estimate:
        """Apply an increasing function to all three."""
        assert callable(function)
        return Estimate(function(self.value), function(self.low), function(self.high))


def score(
    teacher: Teacher, ids: torch.Tensor, reference: torch.Tensor, history: FormatHistory
) -> Scores:
    """Score one text under a format.

    Args:
        teacher: The model.
        ids: int64 [T].
        reference: Last hidden states [T, hidden] with 16-bit KV.
        history: The format.
    """
    hidden = teacher.hidden(ids, history)
    parts: list[tuple[torch.Tensor, ...]] = []
    start = 1
    ours, theirs = teacher.logprobs(hidden[:-1]), teacher.logprobs(reference[:-1])
    for ref, rows in zip(theirs, ours, strict=True):
        targets = ids[start : start + len(rows), None].to(rows.device)
        start += len(rows)
        nll, ref_nll = (-x.gather(1, targets).squeeze(1) for x in (rows, ref))
        parts.append((nll, ref_nll, *compare(ref, rows)))
    return Scores(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def join(scores: list[Scores]) -> Scores:
    """Scores of several texts, one after the other."""
    names = ("nll", "ref_nll", "kl", "agrees")
    return Scores(*(torch.cat([getattr(score, name) for score in scores]) for name in names))


def estimate(values: torch.Tensor) -> Estimate:
    """Mean of per-token values; its interval by bootstrap over blocks of tokens."""
    blocks = values.split(BLOCK_TOKENS)
    sums = torch.stack([block.double().sum() for block in blocks])
    sizes = torch.tensor([len(block) for block in blocks], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(blocks), (DRAWS, len(blocks)), generator=generator)
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    tail = (1 - CONFIDENCE) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(float(values.double().mean()), low, high)


def relative_perplexity(scores: Scores) -> Estimate:
    """Perplexity against that with 16 bits, minus 1."""
    return estimate(scores.nll - scores.ref_nll).map(math.expm1)
