"""FlashInfer's prefill attention over the scratch buffer, one planned wrapper a pass."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.kernels.extend.configs import prefill_backend
from sgl_kvq.kernels.extend.passes import AttentionPass

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
        backend: FlashInfer's kernels: "fa2" or "fa3"; None takes the faster one for each pass.
    """

    def __init__(
        self,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        sm_scale: float,
        device: torch.device | str,
        backend: str | None = None,
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
        self._wrappers: dict[tuple[Any, str], list[Any]] = defaultdict(list)
        self._planned: list[Any] = []
        self._copied: dict[Any, torch.cuda.Event] = {}
        self._device = torch.device(device)

    def plan(self, passes: list[AttentionPass]) -> None:
        """Prepare the passes of a forward; page tables stay on the host until here."""
        self._planned = []
        for step in passes:
            wrapper = self._next_wrapper(step)
            indptrs = (torch.from_numpy(step.qo_indptr), torch.from_numpy(step.kv_indptr))
            if step.kv_indices is None:
                wrapper.plan(*indptrs, causal=step.causal, **self.shape)
            else:
                wrapper.plan(
                    *indptrs,
                    torch.from_numpy(step.kv_indices),
                    torch.from_numpy(step.kv_last_page_len),
                    page_size=PAGE_SIZE,
                    causal=step.causal,
                    **self.shape,
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
        backend = self.backend or prefill_backend(
            step.qo_indptr, self.shape["num_qo_heads"], self._device
        )
        wrappers = self._wrappers[cls, backend]
        for wrapper in wrappers:
            if wrapper not in self._planned and self._copied[wrapper].query():
                return wrapper
        wrapper = cls(self._workspace, "NHD", backend=backend)
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
