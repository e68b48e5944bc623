"""What both instances must agree on about a request: its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xxhash

from sgl_kvq.errors import TransferError


class Prompt(NamedTuple):
    """The tokens whose KV a transfer moves, those that the decode instance has included.

    Args:
        num_tokens: Their number.
        digest: xxh3-64 of their ids as int64, little-endian.
    """

    num_tokens: int
    digest: int


def describe_prompt(token_ids: Sequence[int]) -> Prompt:
    """Count and digest of token ids."""
    ids = np.asarray(token_ids, dtype="<i8")
    return Prompt(len(ids), xxhash.xxh3_64_intdigest(ids.tobytes()))


def check_prompts(prefill: Prompt, decode: Prompt) -> None:
    """Refuse a transfer of KV of other tokens than the decode instance expects.

    Raises:
        TransferError: number or ids differ.
    """
    if prefill == decode:
        return
    same_length = prefill.num_tokens == decode.num_tokens
    counts = f"prefill has {prefill.num_tokens} tokens, decode {decode.num_tokens}"
    ids = f"both have {prefill.num_tokens} tokens, but other ids"
    raise TransferError(
        f"the prompts differ: {ids if same_length else counts}; send the same request to both "
        f"instances, and start both with the same tokenizer and chat template"
    )
