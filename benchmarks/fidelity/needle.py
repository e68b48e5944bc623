"""Needles: numbers hidden at several depths of a long text, asked for at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.fidelity.corpora import segments
from sgl_kvq.fidelity.history import FormatHistory
from sgl_kvq.fidelity.teacher import Teacher

CITIES = (
    "Paris",
    "London",
    "Berlin",
    "Madrid",
    "Rome",
    "Vienna",
    "Dublin",
    "Oslo",
    "Athens",
    "Cairo",
)
QUESTION_TOKENS = 24  # room for one question and its answer


@dataclass(frozen=True)
class NeedleText:
    """A text that ends with questions and their right answers.

    Args:
        ids: int64 [T].
        answers: For each needle, the positions of its answer's tokens.
    """

    ids: torch.Tensor
    answers: list[range]


def needle_texts(tokenizer: Any, context: int, count: int) -> list[NeedleText]:
    """Make texts with one needle a city, at evenly spaced depths.

    The questions follow one another, each with its right answer, so that a text takes one pass; no
    answer tells another.

    Args:
        tokenizer: The model's tokenizer.
        context: Tokens of a text, about.
        count: Texts.
    """
    generator = torch.Generator().manual_seed(0)
    haystack_tokens = context - 2 * QUESTION_TOKENS * len(CITIES)
    texts = []
    for haystack in segments("prose", tokenizer, haystack_tokens, count):
        numbers = torch.randint(1000, 9999, (len(CITIES),), generator=generator).tolist()
        parts = hide(tokenizer, haystack.tolist(), numbers)
        answers = []
        for city, number in zip(CITIES, numbers, strict=True):
            parts += _ids(tokenizer, f"\n\nThe secret number of {city} is")
            answer = _ids(tokenizer, f" {number}")
            answers.append(range(len(parts), len(parts) + len(answer)))
            parts += [*answer, *_ids(tokenizer, ".")]
        texts.append(NeedleText(torch.tensor(parts), answers))
    return texts


def hide(tokenizer: Any, haystack: Sequence[int], numbers: Sequence[int]) -> list[int]:
    """Return the token ids of a text with the number of each city, at evenly spaced depths."""
    step = -(-len(haystack) // len(CITIES))
    ids: list[int] = []
    for index, (city, number) in enumerate(zip(CITIES, numbers, strict=True)):
        ids += haystack[index * step : (index + 1) * step]
        ids += _ids(tokenizer, f"\n\nThe secret number of {city} is {number}.\n\n")
    return ids


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def count_hits(teacher: Teacher, texts: list[NeedleText], history: FormatHistory) -> int:
    """Count needles whose whole answer the model would give greedily."""
    hits = 0
    for text in texts:
        hidden = teacher.hidden(text.ids, history)
        for answer in text.answers:
            rows = hidden[answer.start - 1 : answer.stop - 1]
            found = torch.cat(list(teacher.logprobs(rows))).argmax(-1).cpu()
            hits += int(torch.equal(found, text.ids[answer.start : answer.stop]))
    return hits
