"""The attention passes of an extend step in plain torch, the specification of the libraries'."""

from __future__ import annotations

import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.kernels.extend.passes import AttentionPass
from sgl_kvq.kernels.extend.prefill_attention import AttentionShape


class TorchAttention:
    """A `PrefillAttention` in float64."""

    def __init__(self, shape: AttentionShape, device: torch.device | str) -> None:
        self.sm_scale = shape.sm_scale

    def plan(self, passes: list[AttentionPass]) -> None:
        pass

    def run(
        self,
        index: int,
        step: AttentionPass,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        for n in range(len(step.qo_indptr) - 1):
            rows = slice(int(step.qo_indptr[n]), int(step.qo_indptr[n + 1]))
            keys, values = self._sequence(step, n, k), self._sequence(step, n, v)
            group = q.shape[1] // k.shape[1]
            keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
            scores = torch.einsum("qhd,thd->hqt", q[rows].double(), keys) * self.sm_scale
            if step.causal:
                num_q, num_k = scores.shape[1:]
                mask = torch.ones(num_q, num_k, device=q.device).tril(num_k - num_q) == 0
                scores = scores.masked_fill(mask, -torch.inf)
            out[rows] = torch.einsum("hqt,thd->qhd", scores.softmax(-1), values).to(out.dtype)
            if lse is not None:
                lse[rows] = (scores.logsumexp(-1) * 1.4426950408889634).T.float()

    def _sequence(self, step: AttentionPass, n: int, x: torch.Tensor) -> torch.Tensor:
        begin, end = int(step.kv_indptr[n]), int(step.kv_indptr[n + 1])
        if step.kv_indices is None:
            return x[begin:end]
        pages = x.unflatten(0, (-1, PAGE_SIZE))[torch.from_numpy(step.kv_indices[begin:end]).long()]
        return pages.flatten(0, 1)[: (end - begin - 1) * PAGE_SIZE + int(step.kv_last_page_len[n])]
