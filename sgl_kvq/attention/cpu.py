"""The engine on a CPU: PyTorch operations."""

from __future__ import annotations

import torch

from sgl_kvq.attention.cpu_threads import SMALL_STEP, one_thread_if
from sgl_kvq.attention.layer import LayerSpec
from sgl_kvq.attention.plan.extend import closed_fill, plan_extend
from sgl_kvq.attention.plan.upload import ExtendBatch, upload_extend
from sgl_kvq.attention.step import StepInput, StepMode, step_slots
from sgl_kvq.formats.calibration import change_basis
from sgl_kvq.kernels.append.cpu import (
    DecodeAppend,
    ExtendAppend,
    append_decode,
    append_extend,
    plan_append_decode,
    plan_append_extend,
)
from sgl_kvq.kernels.decode.cpu import DecodePlan, decode, plan_decode
from sgl_kvq.kernels.extend.passes import ExtendRequest
from sgl_kvq.kernels.extend.reference import extend
from sgl_kvq.kernels.page_table.reference import page_table
from sgl_kvq.memory_pool.store import PagedStore


class CpuEngine:
    """An `AttentionEngine` in plain PyTorch.

    Args:
        store: Memory of the pages, in main memory.
        layers: Attention layers of this rank, in the order in which the model calls them.
        req_to_token: int32 [requests, context], token slots by position.
        quantized_prefill: Queries of an extend step read all closed pages in codes.
    """

    def __init__(
        self,
        store: PagedStore,
        layers: list[LayerSpec],
        req_to_token: torch.Tensor,
        quantized_prefill: bool,
    ) -> None:
        self._store = store
        self._req_to_token = req_to_token
        self.quantized_prefill = quantized_prefill
        self._slots = step_slots(store)
        self._decode: tuple[DecodeAppend, DecodePlan] | None = None
        self._extend: tuple[ExtendAppend, list[ExtendRequest], ExtendBatch] | None = None

    def reserve(self, max_batch: int) -> None:
        """Nothing to do: every step allocates its own tensors."""

    def plan(self, step: StepInput) -> None:
        """Look up pages and rows of a step; see `AttentionEngine`."""
        if step.mode is StepMode.DECODE:
            table = page_table(
                step.seq_lens, step.req_pool_indices, self._req_to_token, self._slots
            )
            self._decode = (
                plan_append_decode(table),
                plan_decode(table, self._store.plan.sink_tokens),
            )
        elif step.mode is StepMode.EXTEND:
            plan = plan_extend(step.prefix_lens, step.extend_lens, self.quantized_prefill)
            closed = [closed_fill(request, 0, request.num_closed, 0) for request in plan.requests]
            batch = upload_extend(
                plan, closed, step.req_pool_indices, self._req_to_token, self._slots
            )
            append = plan_append_extend(batch.touched, batch.resumed_slots)
            self._extend = (append, plan.requests, batch)

    def decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: LayerSpec
    ) -> torch.Tensor:
        """Append one row a request and attend; see `AttentionEngine`."""
        assert self._decode is not None
        append, plan = self._decode
        q, k, v = _enter_basis(q, k, v, layer)
        cache, layout = self._store.layer(layer.layer_id), layer.layout
        size = len(plan.pages) * layout.num_kv_heads * layout.head_dim
        with one_thread_if(size <= SMALL_STEP):
            self._store.num_nonfinite += append_decode(cache, layout, k, v, append)
            out, _ = decode(q, cache, plan, layout, layer.sm_scale)
        return _leave_basis(out, layer)

    def extend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: LayerSpec
    ) -> torch.Tensor:
        """Append fresh rows and attend; see `AttentionEngine`."""
        assert self._extend is not None
        append, requests, batch = self._extend
        q, k, v = _enter_basis(q, k, v, layer)
        cache, layout = self._store.layer(layer.layer_id), layer.layout
        rows, num_nonfinite = append_extend(cache, layout, k, v, append)
        self._store.num_nonfinite += num_nonfinite
        out = extend(q, cache, layout, requests, batch.fills, rows, layer.sm_scale)
        return _leave_basis(out, layer)


def _enter_basis(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: LayerSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take q, k, v [tokens, heads, head_dim] to the basis of the pages."""
    basis = layer.basis
    if basis is None:
        return q, k, v
    return change_basis(q, basis.q), change_basis(k, basis.k), change_basis(v, basis.v)


def _leave_basis(out: torch.Tensor, layer: LayerSpec) -> torch.Tensor:
    """Take outputs [tokens, heads, head_dim] back to the model's basis."""
    return out if layer.basis is None else change_basis(out, layer.basis.out)
