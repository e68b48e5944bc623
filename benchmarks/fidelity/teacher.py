"""A causal LM whose attention reads a quantized KV cache, over a whole text at once.

Every token attends to its own page in 16-bit rows and to earlier pages as a format stores them:
what a server with `--kv-quant-prefill quantized` computes, without loops over tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from benchmarks.fidelity.history import FormatHistory
from sgl_kvq.config import PAGE_SIZE

ATTENTION_NAME = "kvq_teacher"
QUERY_ROWS = 512  # queries whose attention to earlier pages is one call
LOGIT_ROWS = 256  # rows of the [T, vocabulary] logits in memory at once

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def page_attention(
    q: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor],
    read: tuple[torch.Tensor, torch.Tensor],
    sm_scale: float,
) -> torch.Tensor:
    """Causal attention: own page from `rows`, earlier pages from `read`.

    Args:
        q: [num_qo_heads, tokens, head_dim], full pages.
        rows: K and V like q, heads repeated for their queries.
        read: Likewise, as stored.
        sm_scale: Factor on the scores.

    Returns:
        Like q.
    """
    pages = [x.unflatten(1, (-1, PAGE_SIZE)).transpose(0, 1).contiguous() for x in (q, *rows)]
    own_out, own_lse = _flash(*pages, 0.0, True, scale=sm_scale)  # [pages, heads, P, D]
    out = own_out.transpose(0, 1).flatten(1, 2)
    lse = own_lse.transpose(0, 1).flatten(1, 2)  # [heads, tokens]
    for start in range(PAGE_SIZE, q.shape[1], QUERY_ROWS):
        stop = min(start + QUERY_ROWS, q.shape[1])
        earlier = torch.arange(start, stop)[:, None] // PAGE_SIZE * PAGE_SIZE
        bias = torch.zeros(stop - start, stop, dtype=q.dtype)
        bias.masked_fill_(torch.arange(stop) >= earlier, -torch.inf)
        k, v = (x[None, :, :stop] for x in read)
        past, past_lse = _flash(
            q[None, :, start:stop], k, v, 0.0, False, attn_mask=bias, scale=sm_scale
        )
        share = torch.sigmoid(past_lse[0] - lse[:, start:stop])[..., None].to(q.dtype)
        out[:, start:stop] = torch.lerp(out[:, start:stop], past[0], share)
    return out


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
    out = history.leave(layer, page_attention(q, (k, v), (read_k, read_v), sm_scale))
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
    """

    def __init__(self, model_path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=dtype, attn_implementation=ATTENTION_NAME
        )
        self.model = model.eval()

    @torch.inference_mode()
    def hidden(self, token_ids: torch.Tensor, history: FormatHistory) -> torch.Tensor:
        """Return the last hidden states, [T, hidden] in the model's type, of int64 [T] tokens."""
        states = self.model.model(input_ids=token_ids[None], use_cache=False, history=history)
        return states.last_hidden_state[0]

    @torch.inference_mode()
    def logprobs(self, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield log-probabilities of the next token, float32 [<= LOGIT_ROWS, vocabulary]."""
        for rows in hidden.split(LOGIT_ROWS):
            yield self.model.lm_head(rows).float().log_softmax(-1)
