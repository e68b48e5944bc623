"""Text to calibrate with when the caller has none: what every Python comes with."""

from __future__ import annotations

import argparse
import asyncio.base_events
import functools
import inspect
import json.decoder
import statistics
from pydoc_data.topics import topics
from typing import Any

NUM_TOPICS = 25
"""Documentation topics of the text; the fidelity benchmark measures on the others."""

MODULES = (argparse, asyncio.base_events, functools, json.decoder, statistics)


def default_text(tokenizer: Any) -> str:
    """Documentation, source code, and documentation as a dialogue, about equally long.

    Args:
        tokenizer: Tokenizer of transformers; the dialogue is left out if it has no chat template.
    """
    named = list(topics.items())[:NUM_TOPICS]
    prose = "".join(text for _, text in named)
    code = "\n\n".join(inspect.getsource(module) for module in MODULES)
    parts = [prose, code[: len(prose)]]
    if tokenizer.chat_template:
        messages = []
        for name, text in sorted(named, key=lambda item: len(item[1])):
            messages.append({"role": "user", "content": f"Please explain {name} in Python."})
            messages.append({"role": "assistant", "content": text.strip()})
        parts.append(str(tokenizer.apply_chat_template(messages, tokenize=False)))
    return "\n\n".join(parts)
