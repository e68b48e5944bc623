"""Prompts of all tasks, as token ids: the same for every server."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.tasks import copying, humaneval, json_objects, needles
from benchmarks.tasks.cases import Case

TASKS = (humaneval.TASK, copying.TASK, needles.ONE, needles.SEVERAL, json_objects.TASK)


@dataclass(frozen=True)
class Prompt:
    """A case as it is sent.

    Attributes:
        case: What it asks.
        ids: Tokens of the prompt, with the begin of the answer.
        digest: Of these tokens; answers to another prompt of the same name are none to this.
    """

    case: Case
    ids: list[int]
    digest: str


def make_prompts(
    tasks: Sequence[str],
    tokenizer: Any,
    context_tokens: int,
    wordings: int,
    needle_tokens: Sequence[int],
    limit: int | None = None,
) -> dict[str, list[Prompt]]:
    """Return the prompts by row of the results.

    Args:
        tasks: Of `TASKS`; each length of needles is a row.
        tokenizer: The model's; its chat template is used if it has one.
        context_tokens: What the model takes; longer prompts are left out, with their answers.
        wordings: Of HumanEval.
        needle_tokens: Lengths of needles' texts.
        limit: Cases of a row.
    """
    makers: dict[str, Callable[[], list[Case]]] = {
        humaneval.TASK: partial(humaneval.cases, wordings),
        copying.TASK: copying.cases,
        json_objects.TASK: json_objects.cases,
    }
    for tokens in needle_tokens:
        if tokens <= context_tokens:
            one = partial(needles.cases_of_one, tokenizer, tokens)
            several = partial(needles.cases_of_several, tokenizer, tokens)
            makers |= {f"{needles.ONE}-{tokens}": one, f"{needles.SEVERAL}-{tokens}": several}
    prompts = {
        row: [make_prompt(case, tokenizer) for case in make()[:limit]]
        for row, make in makers.items()
        if row.partition("-")[0] in tasks
    }
    fitting = {
        row: [prompt for prompt in known if _tokens(prompt) < context_tokens]
        for row, known in prompts.items()
    }
    return {row: known for row, known in fitting.items() if known}


def make_prompt(case: Case, tokenizer: Any) -> Prompt:
    """Render a case: by the chat template, or as plain text for a model without one."""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": case.question}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        encoded = tokenizer(text + case.answer_begin, add_special_tokens=False)
    else:
        encoded = tokenizer(f"{case.question}\n\n{case.answer_begin}")
    ids = list(encoded["input_ids"])
    digest = hashlib.sha256(repr((ids, case.stop, case.max_tokens)).encode()).hexdigest()[:16]
    return Prompt(case, ids, digest)


def _tokens(prompt: Prompt) -> int:
    return len(prompt.ids) + prompt.case.max_tokens
