"""Models and tokenizers of transformers; what cannot be loaded is one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sgl_kvq.errors import ConfigError


def load_tokenizer(path: str | Path) -> Any:
    """Load a tokenizer.

    Args:
        path: Hugging Face folder or name.

    Raises:
        ConfigError: there is none.
    """
    with _one_line(path):
        return AutoTokenizer.from_pretrained(path)


def load_model(path: str | Path, dtype: torch.dtype | str, attention: str, device: str) -> Any:
    """Load a causal language model for inference.

    Args:
        path: Hugging Face folder or name.
        dtype: In what it runs.
        attention: Name of a function of transformers' `AttentionInterface`.
        device: Where it runs.

    Raises:
        ConfigError: there is none, or not of this kind.
    """
    with _one_line(path):
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attention
        )
    return model.eval().requires_grad_(False).to(device)


@contextmanager
def _one_line(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error
