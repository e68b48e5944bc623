"""Text to calibrate with when the caller has none: what every Python comes with."""

from __future__ import annotations

import argparse
import asyncio.base_events
import functools
import inspect
import json.decoder
import statistics
from typing import Any

from sgl_kvq.fidelity.text import calibration_topics

MODULES = (argparse, asyncio.base_events, functools, json.decoder, statistics)


def default_text(tokenizer: Any) -> str:
    """Documentation, source code, and documentation as a dialogue, about equally long.

    Args:
        tokenizer: Tokenizer of transformers; the dialogue is left out if it has no chat template.
    """
    topics = calibration_topics()
    prose = "".join(topics.values())
    code = "\n\n".join(inspect.getsource(module) for module in MODULES)
    parts = [prose, code[: len(prose)]]
    if tokenizer.chat_template:
        messages = []
        for name, text in sorted(topics.items(), key=lambda item: len(item[1])):
            messages.append({"role": "user", "content": f"Please explain {name} in Python."})
            messages.append({"role": "assistant", "content": text.strip()})
        parts.append(str(tokenizer.apply_chat_template(messages, tokenize=False)))
    return "\n\n".join(parts)
