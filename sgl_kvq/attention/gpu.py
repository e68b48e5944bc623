"""The engine on a GPU: Gluon and Triton kernels, a library's 16-bit attention for prefill."""

from __future__ import annotations

from collections import defaultdict

import torch

from sgl_kvq.attention.extend_graphs import MAX_TOKENS, ExtendGraphs
from sgl_kvq.attention.layer import LayerSpec
from sgl_kvq.attention.plan.extend import plan_extend
from sgl_kvq.attention.plan.passes import plan_passes, scratch_pages_of
from sgl_kvq.attention.plan.upload import ExtendBatch, upload_extend
from sgl_kvq.attention.step import StepInput, StepMode, step_slots
from sgl_kvq.errors import ConfigError, KvqError
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.kernels.append.api import PagedLayers, append, close_pages
from sgl_kvq.kernels.change_basis.api import change_basis, change_qkv
from sgl_kvq.kernels.decode.api import DecodeWorkspace, decode
from sgl_kvq.kernels.extend.api import ExtendWorkspace, extend
from sgl_kvq.kernels.extend.configs import prefill_head_dim, scratch_pages
from sgl_kvq.kernels.extend.passes import AttentionPass
from sgl_kvq.kernels.extend.prefill_attention import (
    AttentionShape,
    CapturableAttention,
    MakePrefillAttention,
)
from sgl_kvq.kernels.page_table.api import DecodeTables
from sgl_kvq.memory_pool.storage import PagedCache, PageTable
from sgl_kvq.memory_pool.store import PagedStore


class GpuEngine:
    """An `AttentionEngine` with the GPU kernels.

    Decode steps run in CUDA graphs, over page tables that `plan` makes in one launch before each
    replay. Extend steps run eagerly, or in graphs of one layer each; see `ExtendGraphs`.

    Args:
        store: Memory of the pages, on a GPU.
        layers: Attention layers of this rank, in the order in which the model calls them.
        req_to_token: int32 [requests, context], token slots by position.
        quantized_prefill: Queries of an extend step read all closed pages in codes.
        make_attention: Chooses the library for 16-bit attention.

    Raises:
        ConfigError: heads or layers that the kernels do not cover.
    """

    def __init__(
        self,
        store: PagedStore,
        layers: list[LayerSpec],
        req_to_token: torch.Tensor,
        quantized_prefill: bool,
        make_attention: MakePrefillAttention,
    ) -> None:
        _check_layers(layers)
        self._store = store
        self._layers = layers
        self._req_to_token = req_to_token
        self.quantized_prefill = quantized_prefill
        self._slots = step_slots(store)
        self._max_batch = 0
        self.reserve(len(req_to_token))
        layout, device = layers[0].layout, store.device
        self._max_pages = scratch_pages(layout.num_kv_heads, layout.head_dim, device)
        self._extend_workspace = ExtendWorkspace(layout, self._max_pages, device)
        shape = AttentionShape(
            layers[0].num_qo_heads,
            layout.num_kv_heads,
            prefill_head_dim(layout.head_dim),
            layout.row_dtype,
            layers[0].sm_scale,
        )
        self._prefill = make_attention(shape, device)
        caches: dict[PageLayout, list[PagedCache]] = defaultdict(list)
        for cache, own in zip(store.layers, store.plan.layouts, strict=True):
            caches[own].append(cache)
        self._paged_layers = {own: PagedLayers(alike) for own, alike in caches.items()}
        self._table: PageTable | None = None
        self._num_decoded = 0  # layers of the step that is under way
        self._extend: tuple[list[AttentionPass], ExtendBatch] | None = None
        self._extend_graphs: ExtendGraphs | None = None
        if isinstance(self._prefill, CapturableAttention) and not quantized_prefill:
            self._extend_graphs = ExtendGraphs(self._prefill, self._max_pages, device)

    def reserve(self, max_batch: int) -> None:
        """Allocate tables and partial results for decode batches; see `AttentionEngine`."""
        if max_batch <= self._max_batch:
            return
        self._max_batch = max_batch
        pages_per_request = -(-self._req_to_token.shape[1] // PAGE_SIZE)
        device = self._store.device
        self._tables = DecodeTables(max_batch, max_batch * pages_per_request, device)
        num_qo_heads = self._layers[0].num_qo_heads
        self._workspaces = {
            layout: DecodeWorkspace(max_batch, num_qo_heads, layout, device)
            for layout in set(self._store.plan.layouts)
        }

    def plan(self, step: StepInput) -> None:
        """Make the page table or the attention passes of a step; see `AttentionEngine`."""
        if step.mode is StepMode.DECODE:
            self._num_decoded = 0
            self._table = self._tables.update(
                step.seq_lens, step.req_pool_indices, self._req_to_token, self._slots
            )
        elif step.mode is StepMode.EXTEND:
            plan = plan_extend(step.prefix_lens, step.extend_lens, self.quantized_prefill)
            passes = plan_passes(plan.requests, self._max_pages)
            tables = (step.req_pool_indices, self._req_to_token, self._slots)
            graphs = self._extend_graphs
            if graphs is not None and graphs.plan(plan, passes, *tables):
                self._extend = (passes, graphs.batch)
                return
            if self._extend_workspace.reserve(scratch_pages_of(passes)):
                self._extend_graphs = None  # they write to the buffer of before
            self._prefill.plan(passes)
            fills = [one_pass.fills for one_pass in passes]
            self._extend = (passes, upload_extend(plan, fills, *tables))

    def decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: LayerSpec
    ) -> torch.Tensor:
        """Append one row a request and attend; see `AttentionEngine`.

        Attention stores the fresh rows; after the last layer, one launch quantizes the pages that
        they filled, in all layers of a layout.

        Raises:
            KvqError: the last layer comes before another one, whose pages would never be quantized.
        """
        table, layout = self._table, layer.layout
        assert table is not None
        q, k, v = _enter_basis(q, k, v, layer)
        cache, workspace = self._store.layer(layer.layer_id), self._workspaces[layout]
        out, _ = decode(q, cache, table, layout, layer.sm_scale, workspace, fresh=(k, v))
        self._num_decoded += 1
        if layer.layer_id == self._layers[-1].layer_id:
            self._close_pages(table)
        return _leave_basis(out, layer)

    def _close_pages(self, table: PageTable) -> None:
        """Quantize the pages that a decode step filled, once all of its layers have stored rows."""
        if self._num_decoded != len(self._layers):
            raise KvqError(
                f"attention backend kvq: layer {self._layers[-1].layer_id} came after "
                f"{self._num_decoded} of {len(self._layers)} layers, which is not supported; run "
                f"this model without --kv-quant"
            )
        self._num_decoded = 0
        for layout, layers in self._paged_layers.items():
            close_pages(layers, layout, table, self._store.num_nonfinite)

    def extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: LayerSpec,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Append fresh rows and attend; see `AttentionEngine`."""
        assert self._extend is not None
        passes, batch = self._extend
        q, k, v = _enter_basis(q, k, v, layer)
        cache, layout = self._store.layer(layer.layer_id), layer.layout
        prior_rows = batch.prior_rows(cache)
        append(cache, layout, k, v, batch.touched, self._store.num_nonfinite, prior_rows)
        found, _ = extend(
            q,
            k,
            v,
            cache,
            layout,
            passes,
            batch.fills,
            batch.touched,
            prior_rows,
            self._prefill,
            self._extend_workspace,
            out if layer.basis is None else None,
        )
        return _leave_basis(found, layer, out)

    def capture_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: LayerSpec,
        out: torch.Tensor,
    ) -> None:
        """Record `extend` for any step whose tensors lie here, fresh tokens in the first rows.

        Args:
            q: As of `extend`, at an address that stays.
            k: Likewise.
            v: Likewise.
            layer: Which layer.
            out: Like q, contiguous, likewise.
        """
        graphs, num_tokens = self._extend_graphs, len(q)
        if graphs is None or num_tokens > MAX_TOKENS:
            return
        one_pass, batch = graphs.plan_capture(num_tokens)
        self._extend = ([one_pass], batch)
        key = _graph_key(layer, num_tokens, q, k, v, out)
        graphs.capture(key, lambda: self.extend(q, k, v, layer, out))

    def replay_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: LayerSpec,
        out: torch.Tensor,
        num_tokens: int,
    ) -> bool:
        """Run what `capture_extend` recorded for tensors of `num_tokens` rows.

        Returns:
            Whether it was recorded and the planned step fits; otherwise nothing was done.
        """
        graphs = self._extend_graphs
        key = _graph_key(layer, num_tokens, q, k, v, out)
        return graphs is not None and graphs.replay(key)


def _graph_key(layer: LayerSpec, num_tokens: int, *tensors: torch.Tensor) -> tuple[int, ...]:
    """What a recorded layer depends on: the most tokens and its addresses."""
    return (layer.layer_id, num_tokens, *(x.data_ptr() for x in tensors))


def _check_layers(layers: list[LayerSpec]) -> None:
    """Refuse what the kernels do not cover.

    Raises:
        ConfigError: says what this model has.
    """
    first = layers[0]
    group = first.num_qo_heads // first.layout.num_kv_heads
    head_dim = first.layout.head_dim
    reasons = (
        (not 1 <= group <= 16, f"{group} query heads for a KV head, expected 1 to 16"),
        (not 64 <= head_dim <= 256, f"head_dim {head_dim}, expected 64 to 256"),
        (
            any(layer.sm_scale != first.sm_scale for layer in layers),
            "layers with different score scales",
        ),
        (
            any(layer.num_qo_heads != first.num_qo_heads for layer in layers),
            "layers with different numbers of query heads",
        ),
    )
    for found, what in reasons:
        if found:
            raise ConfigError(
                f"--kv-quant on a GPU: this model has {what}; run it without --kv-quant"
            )


def _enter_basis(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: LayerSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take q, k, v [tokens, heads, head_dim] to basis and dtype of the rows, in one launch."""
    basis, dtype = layer.basis, layer.layout.row_dtype
    if basis is not None:
        q, k, v = change_qkv((q, k, v), (basis.q, basis.k, basis.v))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _leave_basis(
    found: torch.Tensor, layer: LayerSpec, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Take outputs [tokens, heads, head_dim] back to the model's basis, in `out` if it is given."""
    return found if layer.basis is None else change_basis(found, layer.basis.out, out)
