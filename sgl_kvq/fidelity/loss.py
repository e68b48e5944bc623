"""How far a format moves a model's answers, and how much of it is too much."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

WARN_NATS = 0.05
"""Loss from which a server warns: answers of more than a few words change (docs/fidelity.md)."""

REFUSE_NATS = 0.35
"""Loss from which a server does not start unless told to: long answers fall apart."""


@dataclass(frozen=True)
class Loss:
    """What a format loses against 16 bits on a text.

    Args:
        nats: Mean KL divergence of next-token distributions from those of 16 bits, nats a token.
        same_top: Share of tokens after which both find the same token most likely.
    """

    nats: float
    same_top: float

    def __str__(self) -> str:
        return f"{self.nats:.3f} nats a token, same most likely token {self.same_top:.1%}"


def compare(reference: torch.Tensor, found: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare next-token distributions.

    Args:
        reference: Log-probabilities with 16-bit K and V, float32 [tokens, vocabulary].
        found: Likewise with quantized ones.

    Returns:
        KL divergence from the reference, nats, and 1 where the most likely token is the same; both
        float32 [tokens].
    """
    kl = (reference.exp() * (reference - found)).sum(-1)
    return kl, (found.argmax(-1) == reference.argmax(-1)).float()


def mean_loss(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Loss:
    """Mean over a text.

    Args:
        pairs: Arguments of `compare`, some tokens at a time.
    """
    kl, same = (torch.cat(parts) for parts in zip(*(compare(*pair) for pair in pairs), strict=True))
    return Loss(float(kl.mean()), float(same.mean()))


def verdict(loss: Loss) -> str:
    """What a server makes of a loss at start: "served", "served with a warning" or "refused"."""
    if loss.nats <= WARN_NATS:
        return "served"
    return "served with a warning" if loss.nats <= REFUSE_NATS else "refused"  # NaN, too
