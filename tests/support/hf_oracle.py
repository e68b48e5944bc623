"""Reference log-probabilities of a Llama-type model whose KV cache is quantized page by page.

The oracle runs a Hugging Face causal LM over a whole token sequence at once (teacher forcing) and
replaces only its attention: a query reads the page it lives in, and the first ``sink_tokens``
positions of the sequence, as bfloat16 rows, and every earlier page through quantized-dequantized
values. It deliberately shares no code with the system under test, so that agreement of the two
means something.

Conventions: a page is 64 consecutive positions; keys are taken after RoPE; all arithmetic behind
the bfloat16 rows is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

PAGE = 64
MAX_GROUP = 64
MAX_HADAMARD = 128
ATTENTION_NAME = "kvq_oracle"
LOGIT_ROWS = 256  # rows of the [T, vocabulary] logits turned into log-probabilities at a time


@dataclass(frozen=True)
class OracleResult:
    """Teacher-forced scores of one sequence of T tokens.

    Attributes:
        logprobs: float32 [T-1], log p(token t+1 | tokens up to and including t).
        argmax: int64 [T-1], the most probable token after position t.
        margin: float32 [T-1], difference between the two largest log-probabilities.
        top_logprobs: float32 [T-1, top] in descending order, None if none were asked for.
        top_ids: int64 [T-1, top], the tokens of `top_logprobs`.
    """

    logprobs: torch.Tensor
    argmax: torch.Tensor
    margin: torch.Tensor
    top_logprobs: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None


@dataclass(frozen=True)
class TensorFormat:
    """How one of K and V is quantized.

    Attributes:
        bits: Width of a code.
        axis: "channel" has one group per page, head and channel; "token" one per token, head and
            block of channels.
        whole_head: Token axis only: one group spans the whole head instead of at most 64 channels.
        half_up: Round a code with floor(y + 0.5) rather than half to even.
        rotated: Quantize in the basis of the block-diagonal Hadamard matrix.
    """

    bits: int
    axis: Literal["channel", "token"]
    whole_head: bool = False
    half_up: bool = False
    rotated: bool = False


KVFormat = tuple[TensorFormat | None, TensorFormat | None]

_SAW4_V = TensorFormat(4, "token", whole_head=True, half_up=True)

FORMATS: dict[str, KVFormat] = {
    "bf16": (None, None),
    "saw4": (TensorFormat(4, "token", whole_head=True, half_up=True, rotated=True), _SAW4_V),
    "int4": (TensorFormat(4, "token", whole_head=True, half_up=True), _SAW4_V),
    "hack2-v1": (TensorFormat(2, "token"), TensorFormat(2, "channel")),
    "k4v2": (TensorFormat(4, "channel"), TensorFormat(2, "token")),
} | {
    f"{family}{bits}": (TensorFormat(bits, "channel"), TensorFormat(bits, "token"))
    for family in ("hack", "kivi")
    for bits in (2, 4, 8)
}


def _bf16(x: torch.Tensor) -> torch.Tensor:
    """Rounds to the nearest bfloat16 (ties to even) and returns the values as float32."""
    return x.to(torch.bfloat16).to(torch.float32)


def group_size(head_dim: int) -> int:
    """Returns the channels per group of the rule "at most 64"."""
    size = min(MAX_GROUP, head_dim)
    while size > 0 and head_dim % size:
        size -= 16
    if size <= 0:
        raise ValueError(f"no group size divides a head of {head_dim} channels")
    return size


@cache
def hadamard(head_dim: int) -> torch.Tensor:
    """Returns the normalized block-diagonal Sylvester Hadamard matrix, symmetric and orthogonal."""
    order = min(head_dim & -head_dim, MAX_HADAMARD)
    index = torch.arange(order)
    # Sylvester's entry (r, c) is -1 to the number of bits that r and c have in common.
    common = index[:, None] & index[None, :]
    parity = sum((common >> bit) & 1 for bit in range(order.bit_length())) % 2
    block = (1.0 - 2.0 * parity) / order**0.5
    return torch.block_diag(*[block.to(torch.float32)] * (head_dim // order))


def _fake_quantize_groups(
    x: torch.Tensor, dim: int, bits: int, half_up: bool, member: torch.Tensor | None = None
) -> torch.Tensor:
    """Quantizes and dequantizes float32 values whose groups run along one dimension.

    Args:
        x: Values; every other dimension enumerates groups.
        dim: The dimension along which the members of a group lie.
        bits: Width of a code.
        half_up: Rounding of a code, see `TensorFormat`.
        member: Boolean mask that broadcasts to `x`; values outside it do not shape their group's
            range, and what comes back for them means nothing. None means all are members.

    Returns:
        The dequantized values in float32, in the shape of `x`.
    """
    lowest, highest = x, x
    if member is not None:
        lowest = x.masked_fill(~member, float("inf"))
        highest = x.masked_fill(~member, float("-inf"))
    top_code = float(2**bits - 1)
    zero = _bf16(lowest.amin(dim, keepdim=True))
    scale = _bf16((highest.amax(dim, keepdim=True) - zero) / top_code)
    scale = torch.where(scale <= 0, torch.ones_like(scale), scale)
    code = (x - zero) / scale
    code = torch.floor(code + 0.5) if half_up else torch.round(code)
    return code.clamp(0.0, top_code) * scale + zero


def stored_history(rows: torch.Tensor, fmt: TensorFormat | None, sink_tokens: int) -> torch.Tensor:
    """Returns what a query of a later page reads of each position.

    Args:
        rows: float32 [heads, n, head_dim] with bfloat16 values, n a multiple of the page size.
        fmt: How to quantize, None to keep the rows.
        sink_tokens: Positions at the start of the sequence that keep their rows.

    Returns:
        float32 [heads, n, head_dim] in the basis of `rows`.
    """
    if fmt is None or rows.shape[1] == 0:
        return rows
    heads, n, head_dim = rows.shape
    basis = hadamard(head_dim) if fmt.rotated else None
    x = rows if basis is None else rows @ basis
    if fmt.axis == "channel":
        quantized = (torch.arange(n) >= sink_tokens).view(n // PAGE, PAGE, 1)
        x = x.reshape(heads, n // PAGE, PAGE, head_dim)
        x = _fake_quantize_groups(x, 2, fmt.bits, fmt.half_up, quantized)
    else:
        size = head_dim if fmt.whole_head else group_size(head_dim)
        x = x.reshape(heads, n, head_dim // size, size)
        x = _fake_quantize_groups(x, 3, fmt.bits, fmt.half_up)
    x = x.reshape(heads, n, head_dim)
    if basis is not None:
        x = x @ basis  # the matrix is its own inverse
    return torch.cat((rows[:, :sink_tokens], x[:, sink_tokens:]), dim=1)


def paged_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, fmt: KVFormat, sink_tokens: int
) -> torch.Tensor:
    """Computes causal attention in which earlier pages are read in quantized form.

    Args:
        query: [query heads, T, head_dim], after RoPE.
        key: [KV heads, T, head_dim], after RoPE.
        value: [KV heads, T, head_dim].
        fmt: How K and V are quantized.
        sink_tokens: Positions at the start of the sequence that are never quantized.

    Returns:
        float32 [query heads, T, head_dim].
    """
    q_heads, length, head_dim = query.shape
    kv_heads = key.shape[0]
    key, value = _bf16(key), _bf16(value)
    full = length // PAGE * PAGE
    key_history = stored_history(key[:, :full], fmt[0], sink_tokens)
    value_history = stored_history(value[:, :full], fmt[1], sink_tokens)

    # Query heads that share a KV head are adjacent.
    query = query.to(torch.float32).reshape(kv_heads, q_heads // kv_heads, length, head_dim)
    out = torch.empty_like(query)
    future = torch.ones(PAGE, PAGE, dtype=torch.bool).triu(1)
    for start in range(0, length, PAGE):  # queries of one page see the same keys
        stop = min(start + PAGE, length)
        k = torch.cat((key_history[:, :start], key[:, start:stop]), dim=1)
        v = torch.cat((value_history[:, :start], value[:, start:stop]), dim=1)
        scores = query[:, :, start:stop].flatten(1, 2) @ k.transpose(1, 2) * head_dim**-0.5
        own_page = scores.unflatten(1, (-1, stop - start))[..., start:]  # a view
        own_page.masked_fill_(future[: stop - start, : stop - start], float("-inf"))
        page_out = scores.softmax(dim=-1) @ v
        out[:, :, start:stop] = page_out.unflatten(1, (-1, stop - start))
    return out.reshape(q_heads, length, head_dim)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    oracle_format: KVFormat,
    oracle_sink_tokens: int,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for transformers; takes [batch, heads, T, head_dim] with batch 1."""
    if query.shape[0] != 1 or attention_mask is not None or query.shape[2] != key.shape[2]:
        raise ValueError("the oracle takes one whole sequence, without padding and without a cache")
    if scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)
    out = paged_attention(query[0], key[0], value[0], oracle_format, oracle_sink_tokens)
    return out.transpose(0, 1)[None].to(query.dtype).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, _attention)


@lru_cache(maxsize=1)
def _load(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Loads a model, or returns that of the call before."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=ATTENTION_NAME, local_files_only=True
    )
    return model.eval()


@torch.inference_mode()
def oracle_logprobs(
    model_path: str | Path,
    token_ids: Sequence[int],
    fmt: str,
    sink_tokens: int = 4,
    dtype: torch.dtype = torch.float32,
    top: int = 0,
) -> OracleResult:
    """Scores a token sequence under a quantized KV cache.

    Args:
        model_path: Local folder of a Llama-type model.
        token_ids: The sequence, at least two tokens; nothing is prepended to it.
        fmt: Name of a format, a key of `FORMATS`.
        sink_tokens: Positions at the start of the sequence that are never read quantized.
        dtype: In what the model runs; the attention runs in float32 in any case.
        top: How many of the largest log-probabilities to return for each position.

    Returns:
        The scores of tokens 1 to T-1.
    """
    if fmt not in FORMATS:
        raise ValueError(f"unknown format {fmt!r}, expected one of {sorted(FORMATS)}")
    if len(token_ids) < 2:
        raise ValueError("at least two tokens are needed")
    if sink_tokens < 0:
        raise ValueError("sink_tokens must not be negative")
    model = _load(Path(model_path).resolve(), dtype)
    ids = torch.tensor(token_ids, dtype=torch.int64)
    logits = model(
        input_ids=ids[None],
        use_cache=False,
        oracle_format=FORMATS[fmt],
        oracle_sink_tokens=sink_tokens,
    ).logits[0, :-1]

    logprobs, argmax, margin, top_logprobs, top_ids = [], [], [], [], []
    for rows, targets in zip(logits.split(LOGIT_ROWS), ids[1:].split(LOGIT_ROWS), strict=True):
        scores = rows.to(torch.float32).log_softmax(dim=-1)
        best = scores.topk(max(top, 2), dim=-1)
        logprobs.append(scores.gather(1, targets[:, None])[:, 0])
        argmax.append(rows.argmax(dim=-1))
        margin.append(best.values[:, 0] - best.values[:, 1])
        top_logprobs.append(best.values[:, :top])
        top_ids.append(best.indices[:, :top])
    return OracleResult(
        logprobs=torch.cat(logprobs),
        argmax=torch.cat(argmax),
        margin=torch.cat(margin),
        top_logprobs=torch.cat(top_logprobs) if top > 0 else None,
        top_ids=torch.cat(top_ids) if top > 0 else None,
    )
