"""What a task is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Grade:
    """What an answer is worth.

    Attributes:
        passed: Whether it is right.
        similarity: How near it comes, 0 to 1; None where a task has no such measure.
    """

    passed: bool
    similarity: float | None = None


@dataclass(frozen=True)
class Case:
    """One question to a model.

    Attributes:
        task: Row of the results it counts for.
        name: Unique in the task.
        group: Cases of a task with the same group have a text or problem in common, so their
            grades depend on each other.
        question: The user's turn.
        answer_begin: How the answer begins; the model goes on from there.
        stop: Texts that end the answer, and are no part of it.
        max_tokens: Longest answer.
        grade: Grades the model's part of the answer.
    """

    task: str
    name: str
    group: str
    question: str
    answer_begin: str
    stop: tuple[str, ...]
    max_tokens: int
    grade: Callable[[str], Grade]


PYTHON_FENCE = "```python\n"
JSON_FENCE = "```json\n"
FENCE_END = ("\n```",)
