"""FlashInfer's prefill attention over the scratch buffer, one planned wrapper a pass."""

from __future__ import annotations

from typing import Any

import torch

from sgl_kvq.config import PAGE_SIZE
from sgl_kvq.kernels.extend.plan import AttentionPass

WORKSPACE_BYTES = 384 << 20  # what SGLang gives FlashInfer; partial results of its split KV


class FlashInferAttention:
    """Plans passes once a forward and runs them in every layer.

    Args:
        num_qo_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Channels of a head, one that FlashInfer has kernels for.
        dtype: Of q, k and v, 16 bits.
        sm_scale: Factor on the scores.
        device: A CUDA device.
        backend: FlashInfer's kernels: "auto" (fa3 on Hopper), "fa2" or "fa3".
    """

    def __init__(
        self,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        sm_scale: float,
        device: torch.device | str,
        backend: str = "auto",
    ) -> None:
        self.backend = backend
        self.shape: dict[str, Any] = {
            "num_qo_heads": num_qo_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim_qk": head_dim,
            "sm_scale": sm_scale,
            "q_data_type": dtype,
            "kv_data_type": dtype,
        }
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._ragged: list[Any] = []
        self._paged: list[Any] = []
        self._planned: list[Any] = []

    def plan(self, passes: list[AttentionPass]) -> None:
        """Prepare the passes of a forward; page tables stay on the host until here."""
        from flashinfer import (
            BatchPrefillWithPagedKVCacheWrapper,
            BatchPrefillWithRaggedKVCacheWrapper,
        )

        self._planned = []
        num_ragged = num_paged = 0
        for step in passes:
            indptrs = (torch.from_numpy(step.qo_indptr), torch.from_numpy(step.kv_indptr))
            if step.kv_indices is None:
                cls = BatchPrefillWithRaggedKVCacheWrapper
                wrapper = self._wrapper(self._ragged, num_ragged, cls)
                num_ragged += 1
                wrapper.plan(*indptrs, causal=step.causal, **self.shape)
            else:
                cls = BatchPrefillWithPagedKVCacheWrapper
                wrapper = self._wrapper(self._paged, num_paged, cls)
                num_paged += 1
                wrapper.plan(
                    *indptrs,
                    torch.from_numpy(step.kv_indices),
                    torch.from_numpy(step.kv_last_page_len),
                    page_size=PAGE_SIZE,
                    causal=step.causal,
                    **self.shape,
                )
            self._planned.append(wrapper)

    def _wrapper(self, wrappers: list[Any], index: int, cls: Any) -> Any:
        """The wrapper number `index`; each pass of a forward needs one of its own."""
        if index == len(wrappers):
            wrappers.append(cls(self._workspace, "NHD", backend=self.backend))
        return wrappers[index]

    def run(
        self,
        index: int,
        step: AttentionPass,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """Attend in one layer; see `PrefillAttention`."""
        wrapper = self._planned[index]
        if step.kv_indices is None:
            num_keys = int(step.kv_indptr[-1])
            wrapper.run(q, k[:num_keys], v[:num_keys], out=out, lse=lse, return_lse=True)
        else:
            pages = [x.unflatten(0, (-1, PAGE_SIZE)) for x in (k, v)]
            wrapper.run(q, tuple(pages), out=out, lse=lse, return_lse=True)

    def merge(
        self, out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
    ) -> None:
        """Merge another result over other keys into (out, lse); see `PrefillAttention`."""
        from flashinfer import merge_state_in_place

        merge_state_in_place(out, lse, other, other_lse)
