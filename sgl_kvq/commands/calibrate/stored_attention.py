"""Attention that captures gradients with respect to K and V read from closed pages."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from sgl_kvq.formats.base import PAGE_SIZE

QUERY_ROWS = 4 * PAGE_SIZE


def stored_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sm_scale: float,
    on_gradients: Callable[[torch.Tensor, torch.Tensor], None],
) -> torch.Tensor:
    """Causal attention; reports the gradients of K and V as read by tokens of later pages.

    A token reads its own page in 16 bits, so quantizing that page adds no error there.

    Args:
        q: [num_qo_heads, tokens, head_dim], full pages.
        k: [num_kv_heads, tokens, head_dim].
        v: Like k.
        sm_scale: Factor on the scores.
        on_gradients: Called in the backward pass with two tensors like k.

    Returns:
        Like q.
    """
    stored = torch.stack((k, v))
    if stored.requires_grad:
        stored.register_hook(lambda gradient: on_gradients(*gradient.unbind()))
    out: torch.Tensor = checkpoint(_attend, q, k, v, stored, sm_scale, use_reentrant=False)
    return out


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, stored: torch.Tensor, sm_scale: float
) -> torch.Tensor:
    """Own page from k and v, earlier pages from `stored`, a few pages of queries at a time."""
    position = torch.arange(q.shape[1], device=q.device)
    by_head = q.unflatten(0, (len(k), -1))  # [H, G, T, D]
    near_k, near_v, far_k, far_v = (x.unsqueeze(1) for x in (k, v, *stored))
    parts = []
    for start in range(0, q.shape[1], QUERY_ROWS):
        stop = min(start + QUERY_ROWS, q.shape[1])
        asking, asked = position[start:stop, None], position[:stop]
        own = asked >= asking // PAGE_SIZE * PAGE_SIZE
        queries = by_head[:, :, start:stop]
        near, far = queries @ near_k[:, :, start:stop].mT, queries @ far_k[:, :, :stop].mT
        near = torch.nn.functional.pad(near, (start, 0))
        scores = torch.where(own, near, far).float() * sm_scale
        weights = scores.masked_fill(asked > asking, -torch.inf).softmax(-1).to(q.dtype)
        out = (weights * own)[..., start:] @ near_v[:, :, start:stop]
        parts.append(out + weights.masked_fill(own, 0) @ far_v[:, :, :stop])
    return torch.cat(parts, 2).flatten(0, 1)
