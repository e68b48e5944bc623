"""FlashAttention-3's two functions in torch, as far as `FlashAttention3` calls them."""

from __future__ import annotations

import math
from typing import Any

import torch

Result = tuple[torch.Tensor, torch.Tensor]


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: Any,
) -> Result:
    """Keys of a sequence lie in one piece."""
    assert int(cu_seqlens_k.diff().max()) <= max_seqlen_k
    keys = [
        (k[begin:end], v[begin:end])
        for begin, end in zip(cu_seqlens_k[:-1].tolist(), cu_seqlens_k[1:].tolist(), strict=True)
    ]
    return _attend(q, keys, cu_seqlens_q, max_seqlen_q, **options)


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    page_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    **options: Any,
) -> Result:
    """Keys of a sequence lie in pages."""
    keys = []
    for pages, length in zip(page_table.long(), cache_seqlens.tolist(), strict=True):
        assert length <= len(pages) * k_cache.shape[1]
        keys.append(tuple(x[pages].flatten(0, 1)[:length] for x in (k_cache, v_cache)))
    return _attend(q, keys, cu_seqlens_q, max_seqlen_q, **options)


def _attend(
    q: torch.Tensor,
    keys: list[Any],
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    *,
    softmax_scale: float,
    causal: bool,
    num_splits: int,
    return_softmax_lse: bool,
    out: torch.Tensor,
) -> Result:
    """Rows of q beyond the last sequence are left alone; a sequence of no keys gives zeros."""
    assert num_splits >= 0
    assert return_softmax_lse
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
    lse = torch.full((q.shape[1], len(q)), -math.inf)
    bounds = zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True)
    for (begin, end), (k, v) in zip(bounds, keys, strict=True):
        group = q.shape[1] // k.shape[1]
        wide_k, wide_v = (x.double().repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,thd->hqt", q[begin:end].double(), wide_k) * softmax_scale
        if causal:
            num_q, num_k = scores.shape[1:]
            hidden = torch.ones(num_q, num_k).tril(num_k - num_q) == 0
            scores = scores.masked_fill(hidden, -math.inf)
        weights = scores.softmax(-1).nan_to_num()
        out[begin:end] = torch.einsum("hqt,thd->qhd", weights, wide_v).to(out.dtype)
        lse[:, begin:end] = scores.logsumexp(-1).float()
    return out, lse
