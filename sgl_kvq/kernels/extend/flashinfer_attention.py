"""FlashInfer's prefill attention (fa2) over the scratch buffer, one planned wrapper a pass."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.kernels.extend.passes import AttentionPass
from sgl_kvq.kernels.extend.prefill_attention import AttentionShape

WORKSPACE_BYTES = 384 << 20  # what SGLang gives FlashInfer; partial results of its split KV


class FlashInferAttention:
    """A `PrefillAttention`: plans passes once a forward and runs them in every layer.

    Args:
        shape: Heads and numbers of the layers.
        device: A CUDA device.
    """

    def __init__(self, shape: AttentionShape, device: torch.device | str) -> None:
        self._shape: dict[str, Any] = {
            "num_qo_heads": shape.num_qo_heads,
            "num_kv_heads": shape.num_kv_heads,
            "head_dim_qk": shape.head_dim,
            "sm_scale": shape.sm_scale,
            "q_data_type": shape.dtype,
            "kv_data_type": shape.dtype,
        }
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrappers: dict[Any, list[Any]] = defaultdict(list)
        self._planned: list[Any] = []
        self._copied: dict[Any, torch.cuda.Event] = {}

    def plan(self, passes: list[AttentionPass]) -> None:
        """Prepare the passes of a forward; page tables stay on the host until here."""
        self._planned = []
        for step in passes:
            wrapper = self._next_wrapper(step)
            indptrs = (torch.from_numpy(step.qo_indptr), torch.from_numpy(step.kv_indptr))
            if step.kv_indices is None:
                wrapper.plan(*indptrs, causal=step.causal, **self._shape)
            else:
                wrapper.plan(
                    *indptrs,
                    torch.from_numpy(step.kv_indices),
                    torch.from_numpy(step.kv_last_page_len),
                    page_size=PAGE_SIZE,
                    causal=step.causal,
                    **self._shape,
                )
            self._planned.append(wrapper)
            self._copied[wrapper].record()

    def _next_wrapper(self, step: AttentionPass) -> Any:
        """A wrapper that this forward does not use yet, and whose last plan has left the host.

        `plan` writes to page-locked memory and starts a copy from there. The host may be forwards
        ahead of the device, so that the last copy may still have to begin.
        """
        import flashinfer

        is_ragged = step.kv_indices is None
        cls = (
            flashinfer.BatchPrefillWithRaggedKVCacheWrapper
            if is_ragged
            else flashinfer.BatchPrefillWithPagedKVCacheWrapper
        )
        wrappers = self._wrappers[cls]
        for wrapper in wrappers:
            if wrapper not in self._planned and self._copied[wrapper].query():
                return wrapper
        wrapper = cls(self._workspace, "NHD", backend="fa2")
        self._copied[wrapper] = torch.cuda.Event()  # not recorded yet: nothing to wait for
        wrappers.append(wrapper)
        return wrapper

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
        """Attend in one layer; see `PrefillAttention`."""
        wrapper = self._planned[index]
        q = q.contiguous()
        results: dict[str, Any] = {"out": out, "lse": lse, "return_lse": lse is not None}
        if step.kv_indices is None:
            num_keys = int(step.kv_indptr[-1])
            wrapper.run(q, k[:num_keys], v[:num_keys], **results)
        else:
            pages = [x.unflatten(0, (-1, PAGE_SIZE)) for x in (k, v)]
            wrapper.run(q, tuple(pages), **results)
