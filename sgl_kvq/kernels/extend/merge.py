"""Merge attention over two sets of keys by their log-sum-exp."""

from __future__ import annotations

import torch

from sgl_kvq.kernels.extend.kernel import _merge_fwd_kernel


def merge(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> None:
    """Merge a result over other keys into (out, lse).

    Args:
        out: [tokens, num_qo_heads, head_dim], contiguous, head_dim a power of two; written.
        lse: float32 [tokens, num_qo_heads] in log base 2, contiguous; -inf: no key. Written.
        other: Like out.
        other_lse: Like lse.

    Source: FlashInfer (arXiv 2501.01005), section 2.2, attention states.
    """
    _merge_fwd_kernel[(lse.numel(),)](out, lse, other, other_lse, HEAD_DIM=out.shape[2])
