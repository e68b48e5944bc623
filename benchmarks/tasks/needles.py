"""Retrieval: numbers hidden in long prose; one or several are asked for at its end."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks.fidelity.corpora import CORPORA
from benchmarks.fidelity.needle import CITIES, QUESTION_TOKENS, hide
from benchmarks.tasks.cases import Case, Grade

ONE, SEVERAL = "needle", "needles"
TEXTS = 10
OFFSETS = (0, 3, 5, 8)
"""Cities of a question for several, counted from its first."""
SEVERAL_QUESTION = """{text}

What are the secret numbers of {cities}? Answer with one line for each of them, in this order: the
city, a colon, its number."""


def cases_of_one(tokenizer: Any, tokens: int) -> list[Case]:
    """Return a case for each needle of `TEXTS` texts of about `tokens` tokens."""
    return [
        Case(
            task=f"{ONE}-{tokens}",
            name=f"text {index} {city}",
            group=f"text {index}",
            question=f"{text}\n\nWhat is the secret number of {city}?",
            answer_begin=f"The secret number of {city} is",
            stop=("\n",),
            max_tokens=16,
            grade=partial(grade, [number]),
        )
        for index, (text, numbers) in enumerate(haystacks(tokenizer, tokens))
        for city, number in zip(CITIES, numbers, strict=True)
    ]


def cases_of_several(tokenizer: Any, tokens: int) -> list[Case]:
    """Return five cases for each text, of four needles each; all numbers must be right."""
    made = []
    for index, (text, numbers) in enumerate(haystacks(tokenizer, tokens)):
        for first in range(0, len(CITIES), 2):
            chosen = [(first + offset) % len(CITIES) for offset in OFFSETS]
            cities = [CITIES[place] for place in chosen]
            made.append(
                Case(
                    task=f"{SEVERAL}-{tokens}",
                    name=f"text {index} {' '.join(cities)}",
                    group=f"text {index}",
                    question=SEVERAL_QUESTION.format(text=text, cities=", ".join(cities)),
                    answer_begin=f"{cities[0]}:",
                    stop=("\n\n",),
                    max_tokens=64,
                    grade=partial(grade, [numbers[place] for place in chosen]),
                )
            )
    return made


def haystacks(tokenizer: Any, tokens: int) -> Iterator[tuple[str, list[int]]]:
    """Yield `TEXTS` texts with the numbers of all cities, the same for every task.

    Texts begin at different places of the corpus and may overlap; their numbers differ.

    Args:
        tokenizer: The model's tokenizer.
        tokens: Of a text with a question and its answer, about.
    """
    ids = tokenizer(CORPORA["prose"](tokenizer), add_special_tokens=False)["input_ids"]
    length = tokens - 2 * QUESTION_TOKENS * len(CITIES)
    drawn = random.Random(tokens)
    for index in range(TEXTS):
        start = index * len(ids) // TEXTS
        haystack = [ids[(start + place) % len(ids)] for place in range(length)]
        numbers = drawn.sample(range(1000, 9999), len(CITIES))
        ids_with_numbers = hide(tokenizer, haystack, numbers)
        yield tokenizer.decode(ids_with_numbers, clean_up_tokenization_spaces=False), numbers


def grade(numbers: Sequence[int], answer: str) -> Grade:
    """Compare the first numbers of an answer, in their order."""
    found = re.findall(r"\d+", answer)[: len(numbers)]
    return Grade(found == [str(number) for number in numbers])
