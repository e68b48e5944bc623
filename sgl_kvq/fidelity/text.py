"""The text that losses are measured on: documentation that comes with every Python."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import torch

NUM_TOPICS = 25
"""Leading documentation topics that calibration uses by default; losses are measured on others."""

MANY_CHARACTERS = 16
"""More than a token has on average."""


def calibration_topics() -> dict[str, str]:
    """Documentation topics that calibration may see, by name."""
    return dict(list(topics.items())[:NUM_TOPICS])


def measured_topics() -> dict[str, str]:
    """All others, by name."""
    return dict(list(topics.items())[NUM_TOPICS:])


def measured_ids(tokenizer: Any, num_tokens: int) -> torch.Tensor:
    """The beginning of the measured documentation.

    Args:
        tokenizer: Tokenizer of transformers.
        num_tokens: Tokens wanted.

    Returns:
        int64 [num_tokens].
    """
    text = "".join(measured_topics().values())[: num_tokens * MANY_CHARACTERS]
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:num_tokens])
