"""What both instances must agree on about a request: its tokens, and the weights that serve it."""

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
        weights: Version of the weights that the instance serves.
    """

    num_tokens: int
    digest: int
    weights: str


def describe_prompt(token_ids: Sequence[int], weights: str = "") -> Prompt:
    """Count and digest of token ids, and the weights that serve them."""
    ids = np.asarray(token_ids, dtype="<i8")
    return Prompt(len(ids), xxhash.xxh3_64_intdigest(ids.tobytes()), weights)


def check_prompts(prefill: Prompt, decode: Prompt) -> None:
    """Refuse a transfer of KV of other tokens or weights than the decode instance expects.

    Raises:
        TransferError: number or ids of the tokens differ, or the weights.
    """
    if prefill == decode:
        return
    if prefill.weights != decode.weights:
        raise TransferError(
            f"the weights differ: prefill serves version {prefill.weights!r}, decode "
            f"{decode.weights!r}; update the weights of both instances, with one weight_version"
        )
    same_length = prefill.num_tokens == decode.num_tokens
    counts = f"prefill has {prefill.num_tokens} tokens, decode {decode.num_tokens}"
    ids = f"both have {prefill.num_tokens} tokens, but other ids"
    raise TransferError(
        f"the prompts differ: {ids if same_length else counts}; send the same request to both "
        f"instances, and start both with the same tokenizer and chat template"
    )
