"""A causal LM whose attention reads a quantized KV cache, over a whole text at once.

Every token attends to its own page in 16-bit rows and to earlier pages as a format stores them:
what a server with `--kv-quant-prefill quantized` computes, without loops over tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface

from sgl_kvq.fidelity.history import FormatHistory
from sgl_kvq.fidelity.loading import load_model
from sgl_kvq.formats.base import PAGE_SIZE

ATTENTION_NAME = "kvq_teacher"
QUERY_ROWS = 512  # queries whose attention to earlier pages is one call
LOGIT_ROWS = 256  # rows of the [T, vocabulary] logits in memory at once


def page_attention(
    q: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor],
    read: tuple[torch.Tensor, torch.Tensor],
    sm_scale: float,
    window_pages: int = 0,
) -> torch.Tensor:
    """Causal attention: own page and a window before it from `rows`, earlier pages from `read`.

    Args:
        q: [num_qo_heads, tokens, head_dim], full pages.
        rows: K and V like q, heads repeated for their queries.
        read: Likewise, as stored.
        sm_scale: Factor on the scores.
        window_pages: Closed pages before a token's own that are still read as rows.

    Returns:
        Like q.
    """
    out, lse = _recent(q, rows, sm_scale, window_pages)
    first = (1 + window_pages) * PAGE_SIZE
    for start in range(first, q.shape[1], QUERY_ROWS):
        stop = min(start + QUERY_ROWS, q.shape[1])
        position = torch.arange(start, stop, device=q.device)[:, None]
        end = (position // PAGE_SIZE - window_pages) * PAGE_SIZE
        k, v = (x[:, : stop - window_pages * PAGE_SIZE] for x in read)
        hidden = torch.arange(k.shape[1], device=q.device) >= end
        past, past_lse = _attend(q[:, start:stop], k, v, hidden, sm_scale)
        share = torch.sigmoid(past_lse - lse[:, start:stop])[..., None].to(q.dtype)
        out[:, start:stop] = torch.lerp(out[:, start:stop], past, share)
    return out


def _recent(
    q: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor], sm_scale: float, window_pages: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the own page and to the window before it: out like q, lse [heads, tokens]."""
    pages = [x.unflatten(1, (-1, PAGE_SIZE)).transpose(0, 1) for x in (q, *rows)]
    padded = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 0, window_pages, 0)) for x in pages[1:])
    k, v = (  # [pages, heads, (1 + window_pages) * P, D]
        x.unfold(0, 1 + window_pages, 1).permute(0, 1, 4, 2, 3).flatten(2, 3) for x in padded
    )
    place = torch.arange(-window_pages * PAGE_SIZE, PAGE_SIZE, device=q.device)
    future = place > torch.arange(PAGE_SIZE, device=q.device)[:, None]
    page_start = torch.arange(len(pages[0]), device=q.device)[:, None, None] * PAGE_SIZE
    hidden = (future | (place + page_start < 0)).unsqueeze(1)  # [pages, 1, P, span]
    out, lse = _attend(pages[0], k, v, hidden, sm_scale)
    return out.transpose(0, 1).flatten(1, 2), lse.transpose(0, 1).flatten(1, 2)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention like q, and the logarithm of its denominator; `hidden` marks keys not seen."""
    compute = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(compute) @ k.to(compute).transpose(-1, -2) * sm_scale
    scores.masked_fill_(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse.unsqueeze(-1)).exp_()
    return (weights @ v.to(compute)).to(q.dtype), lse


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    history: FormatHistory,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers: [1, heads, T, head_dim] to [1, T, heads, head_dim]."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    length = query.shape[2]
    pad = (0, 0, 0, -length % PAGE_SIZE)
    padded = (torch.nn.functional.pad(x[0], pad) for x in (query, key, value))
    q, k, v = history.enter(layer, *padded)
    gqa_group = len(q) // len(k)
    k, v, read_k, read_v = (
        x.to(q.dtype).repeat_interleave(gqa_group, 0) for x in (k, v, *history.read(layer, k, v))
    )
    sm_scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    window = history.window_pages
    out = history.leave(layer, page_attention(q, (k, v), (read_k, read_v), sm_scale, window))
    if history.errors is not None:
        exact = history.leave(layer, page_attention(q, (k, v), (k, v), sm_scale))
        error = (out - exact).float().square().sum((1, 2))
        history.errors[layer] = error / exact.float().square().sum((1, 2))
    return out[:, :length].transpose(0, 1)[None].contiguous(), None


AttentionInterface.register(ATTENTION_NAME, _attention)


class Teacher:
    """A model that scores texts under a KV format.

    Args:
        model_path: Hugging Face folder.
        dtype: In what the model runs; float32 keeps rounding out of the comparison.
        device: Where it runs.
    """

    def __init__(
        self, model_path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> None:
        self.model = load_model(model_path, dtype, ATTENTION_NAME, device)
        self.device = torch.device(device)

    @torch.inference_mode()
    def hidden(self, token_ids: torch.Tensor, history: FormatHistory) -> torch.Tensor:
        """Return the last hidden states, [T, hidden] in the model's type, of int64 [T] tokens."""
        ids = token_ids[None].to(self.device)
        states = self.model.base_model(input_ids=ids, use_cache=False, history=history)
        return states.last_hidden_state[0]

    @torch.inference_mode()
    def logprobs(self, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield log-probabilities of the next token, float32 [<= LOGIT_ROWS, vocabulary]."""
        for rows in hidden.split(LOGIT_ROWS):
            yield self.model.get_output_embeddings()(rows).float().log_softmax(-1)
