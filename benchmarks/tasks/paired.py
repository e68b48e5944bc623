"""A system against the reference on the same prompts: lost, won, and how sure that is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Pair:
    """Grades of one prompt.

    Attributes:
        group: Of its case.
        passed: Whether the system's answer is right.
        reference_passed: Whether the reference's is.
    """

    group: str
    passed: bool
    reference_passed: bool


@dataclass(frozen=True)
class Comparison:
    """What the pairs say.

    Attributes:
        n: Pairs.
        passed: Right answers of the system.
        bf16_passed: Right answers of the reference.
        lost: Right in the reference only.
        won: Right in the system only.
        low: 95% interval of `(won - lost) / n`, lower end.
        high: Likewise, upper end.
        p: Probability of a difference as large or larger if neither is better, two-sided.
    """

    n: int
    passed: int
    bf16_passed: int
    lost: int
    won: int
    low: float
    high: float
    p: float


def compare(pairs: Sequence[Pair]) -> Comparison:
    """Compare a system with the reference; groups, not pairs, are taken as independent.

    With every pair a group of its own, `p` is McNemar's exact test and the interval that of Agresti
    and Min (2005): Wald's with half a pair added to each of the four cells, so that it does not
    vanish with the differences. Groups add so much of their mean size.
    """
    sums: dict[str, int] = defaultdict(int)
    for pair in pairs:
        sums[pair.group] += pair.passed - pair.reference_passed
    differences = list(sums.values())
    total, size = sum(differences), len(pairs) / len(differences)
    squares = sum(difference**2 for difference in differences) + size**2
    half = NORMAL_95 * math.sqrt(squares - total**2 / (len(differences) + 2))
    padded = len(pairs) + 2 * size
    return Comparison(
        n=len(pairs),
        passed=sum(pair.passed for pair in pairs),
        bf16_passed=sum(pair.reference_passed for pair in pairs),
        lost=sum(pair.reference_passed and not pair.passed for pair in pairs),
        won=sum(pair.passed and not pair.reference_passed for pair in pairs),
        low=(total - half) / padded,
        high=(total + half) / padded,
        p=sign_test(differences),
    )


def sign_test(differences: Sequence[int]) -> float:
    """Two-sided p of a sum of differences if each had either sign with probability 1/2, exact."""
    sizes = [abs(difference) for difference in differences if difference]
    probability = np.ones(1)  # of the sum of signed sizes, from -sum to sum
    for size in sizes:
        step = np.zeros(2 * size + 1)
        step[0] = step[-1] = 0.5
        probability = np.convolve(probability, step)
    sums = np.arange(len(probability)) - sum(sizes)
    return min(1.0, float(probability[abs(sums) >= abs(sum(differences))].sum()))
