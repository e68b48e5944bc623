"""The attention backend on a GPU: Gluon and Triton kernels, FlashInfer for prefill."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from sgl_kvq.attention.plan.extend import plan_extend
from sgl_kvq.attention.plan.upload import ExtendBatch, upload_extend
from sgl_kvq.errors import ConfigError, KvqError
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.host.attention import KvqAttnBackend
from sgl_kvq.host.rank_basis import RankBasis
from sgl_kvq.kernels.append.api import PagedLayers, append, close_pages
from sgl_kvq.kernels.change_basis.api import change_basis, change_qkv
from sgl_kvq.kernels.decode.api import DecodeWorkspace, decode
from sgl_kvq.kernels.extend.api import ExtendWorkspace, extend
from sgl_kvq.kernels.extend.configs import prefill_head_dim, scratch_pages
from sgl_kvq.kernels.extend.flashinfer_attention import FlashInferAttention
from sgl_kvq.kernels.page_table.api import DecodeTables
from sgl_kvq.memory_pool.storage import PagedCache, PageTable, SlotMaps


class GpuAttnBackend(KvqAttnBackend):
    """Attention with the GPU kernels; see `KvqAttnBackend`.

    Decode steps run in CUDA graphs, over page tables that one launch makes before each replay.
    Extend steps run eagerly.

    Raises:
        ConfigError: heads or layers that the kernels do not cover.
    """

    needs_cpu_seq_lens = False

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        layer = self.layers[0]
        self._check_heads(layer)
        device = self.pool.device
        self.slots = SlotMaps(self.pool.open_slots.slot_of, self.pool.sink_slots.slot_of)
        self._reserve(self.req_to_token.shape[0])
        self.max_pages = scratch_pages(self.layout.num_kv_heads, self.layout.head_dim)
        self.extend_workspace = ExtendWorkspace(self.layout, self.max_pages, device)
        self.prefill = FlashInferAttention(
            layer.tp_q_head_num,
            self.layout.num_kv_heads,
            prefill_head_dim(self.layout.head_dim),
            self.layout.row_dtype,
            layer.scaling,
            device,
        )
        caches: dict[PageLayout, list[PagedCache]] = defaultdict(list)
        for cache, layout in zip(self.pool.layers, self.pool.plan.layouts, strict=True):
            caches[layout].append(cache)
        self.paged_layers = {layout: PagedLayers(alike) for layout, alike in caches.items()}
        self.decode_metadata: PageTable | None = None
        self.num_decoded = 0  # layers of the step that is under way
        self.extend_metadata: ExtendBatch | None = None

    def _check_heads(self, layer: Any) -> None:
        group = layer.tp_q_head_num // self.layout.num_kv_heads
        head_dim = self.layout.head_dim
        reasons = (
            (not 1 <= group <= 16, f"{group} query heads for a KV head, expected 1 to 16"),
            (not 64 <= head_dim <= 256, f"head_dim {head_dim}, expected 64 to 256"),
            (
                any(other.scaling != layer.scaling for other in self.layers),
                "layers with different score scales",
            ),
        )
        for found, what in reasons:
            if found:
                raise ConfigError(
                    f"--kv-quant on a GPU: this model has {what}; run it without --kv-quant"
                )

    def _reserve(self, max_batch: int) -> None:
        """Allocate tables and partial results for decode batches of `max_batch`."""
        self.max_batch = max_batch
        pages_per_request = -(-self.req_to_token.shape[1] // PAGE_SIZE)
        device = self.pool.device
        self.tables = DecodeTables(max_batch, max_batch * pages_per_request, device)
        num_qo_heads = self.layers[0].tp_q_head_num
        self.workspaces = {
            layout: DecodeWorkspace(max_batch, num_qo_heads, layout, device)
            for layout in set(self.pool.plan.layouts)
        }

    def enter_basis(
        self, qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], basis: RankBasis
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Take q, k, v to the basis of the pages in one launch; see `KvqAttnBackend`."""
        return change_qkv(qkv, (basis.q, basis.k, basis.v))

    def leave_basis(self, out: torch.Tensor, basis: RankBasis) -> torch.Tensor:
        """Take outputs back; see `KvqAttnBackend`."""
        return change_basis(out, basis.out)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make room for the largest captured batch; see `AttentionBackend`."""
        if max_bs > self.max_batch:
            self._reserve(max_bs)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Length of a padding row: one token, in page and slot 0."""
        return 1

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Make tables or plan of a step; see `AttentionBackend`.

        SGLang lets its scheduler change token tables as soon as this returns, so that all of them
        are read here, not inside the graph.
        """
        self.refuse_mode(forward_batch)
        mode = forward_batch.forward_mode
        if mode.is_decode():
            self.num_decoded = 0
            self.decode_metadata = self.tables.update(
                forward_batch.seq_lens,
                forward_batch.req_pool_indices,
                self.req_to_token,
                self.slots,
            )
        elif mode.is_extend():
            self._plan_extend(forward_batch)

    def _plan_extend(self, forward_batch: Any) -> None:
        plan = plan_extend(
            list(forward_batch.extend_prefix_lens_cpu),
            list(forward_batch.extend_seq_lens_cpu),
            self.config.quantized_prefill,
            self.max_pages,
        )
        self.extend_workspace.reserve(plan.scratch_pages)
        self.prefill.plan(plan.passes)
        self.extend_metadata = upload_extend(
            plan, self.req_to_token, forward_batch.req_pool_indices, self.slots
        )

    def attend_decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any
    ) -> torch.Tensor:
        """See `KvqAttnBackend`.

        Attention stores the fresh rows; after the last layer, one launch quantizes the pages that
        they filled, in all layers of a layout.

        Raises:
            KvqError: the last layer comes before another one, whose pages would never be quantized.
        """
        q, k, v = (x.to(self.layout.row_dtype) for x in (q, k, v))
        table = self.decode_metadata
        assert table is not None
        cache, layout = self.pool.layer(layer.layer_id), self.pool.layout_of(layer.layer_id)
        workspace = self.workspaces[layout]
        out, _ = decode(q, cache, table, layout, layer.scaling, workspace, fresh=(k, v))
        self.num_decoded += 1
        if layer.layer_id == self.layers[-1].layer_id:
            if self.num_decoded != len(self.layers):
                raise KvqError(
                    f"attention backend kvq: layer {layer.layer_id} came after {self.num_decoded} "
                    f"of {len(self.layers)} layers, which is not supported; run this model "
                    f"without --kv-quant"
                )
            self.num_decoded = 0
            for layout, layers in self.paged_layers.items():
                close_pages(layers, layout, table, self.pool.num_contained)
        return out

    def attend_extend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any
    ) -> torch.Tensor:
        """See `KvqAttnBackend`."""
        q, k, v = (x.to(self.layout.row_dtype) for x in (q, k, v))
        batch = self.extend_metadata
        assert batch is not None
        cache, layout = self.pool.layer(layer.layer_id), self.pool.layout_of(layer.layer_id)
        prior_rows = batch.prior_rows(cache)
        contained = self.pool.num_contained
        append(cache, layout, k, v, batch.touched, contained, prior_rows)
        out, _ = extend(
            q,
            k,
            v,
            cache,
            layout,
            batch.passes,
            batch.fills,
            batch.touched,
            prior_rows,
            self.prefill,
            self.extend_workspace,
        )
        return out

    def support_triton(self) -> bool:
        """SGLang may use its own Triton helper kernels."""
        return True
