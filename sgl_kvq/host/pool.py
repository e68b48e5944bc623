"""The quantized pool behind SGLang's `KVCache` interface."""

from __future__ import annotations

import logging
from typing import Any, NoReturn

import torch

from sgl_kvq.errors import KvqError
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.host.names import GPU_MEMORY_TYPE_KV_CACHE, KVCache
from sgl_kvq.memory_pool.capacity import PoolPlan
from sgl_kvq.memory_pool.slots import SlotTable
from sgl_kvq.memory_pool.storage import PagedCache

logger = logging.getLogger(__name__)


class QuantizedKVPool(KVCache):
    """Closed pages as opaque bytes, open pages and sink tokens as 16-bit rows.

    One uint8 row a page and layer holds codes, scales, minima and code sums. The allocator tells
    which pages hold an open slot (a running request writes them) and which a sink slot (they hold
    position 0 of a sequence); both go with the page when it is freed.

    Args:
        plan: Sizes.
        device: Where everything lives.
        start_layer: First layer of this rank.
        enable_memory_saver: SGLang's option of that name.
    """

    def __init__(
        self, plan: PoolPlan, device: str, start_layer: int = 0, enable_memory_saver: bool = False
    ) -> None:
        layout = plan.layout
        super().__init__(
            plan.num_tokens,
            PAGE_SIZE,
            layout.row_dtype,
            plan.num_layers,
            device,
            enable_memory_saver,
            start_layer,
            start_layer + plan.num_layers - 1,
        )
        self.plan = plan
        self.layout = layout
        self.head_num = layout.num_kv_heads
        self.head_dim = layout.head_dim
        rows = (layout.num_kv_heads, layout.head_dim)
        with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE):
            self._layers = [
                PagedCache(
                    pages=torch.zeros(
                        (plan.num_pages + 1, of_layer.page_bytes), dtype=torch.uint8, device=device
                    ),
                    open_rows=torch.zeros(
                        (plan.open_slots + 1, 2, PAGE_SIZE, *rows),
                        dtype=layout.row_dtype,
                        device=device,
                    ),
                    sink_rows=torch.zeros(
                        (plan.sink_slots + 1, 2, plan.sink_tokens, *rows),
                        dtype=layout.row_dtype,
                        device=device,
                    ),
                )
                for of_layer in plan.layouts
            ]
        self.open_slots = SlotTable("open pages", plan.open_slots, plan.num_pages, device)
        self.sink_slots = SlotTable("sink rows", plan.sink_slots, plan.num_pages, device)
        self.num_contained = torch.zeros((), dtype=torch.int64, device=device)
        self.mem_usage = self.get_kv_size_bytes() / 2**30
        logger.info(plan.describe())

    def layer(self, layer_id: int) -> PagedCache:
        """Storage of one layer."""
        return self._layers[layer_id - self.start_layer]

    def layout_of(self, layer_id: int) -> PageLayout:
        """Layout of one layer's pages."""
        return self.plan.layouts[layer_id - self.start_layer]

    @property
    def layers(self) -> list[PagedCache]:
        """Storage of this rank's layers, in order."""
        return self._layers

    def get_kv_size_bytes(self) -> int:
        """Bytes allocated, open pages and sink rows included."""
        return self.plan.total_bytes

    def get_contiguous_buf_infos(self) -> tuple[list[int], list[int], list[int]]:
        """Describe the closed pages: address, bytes and bytes per page of each layer."""
        buffers = [layer.pages for layer in self._layers]
        return (
            [buffer.data_ptr() for buffer in buffers],
            [buffer.nbytes for buffer in buffers],
            [layout.page_bytes for layout in self.plan.layouts],
        )

    def get_cpu_copy(self, indices: torch.Tensor, mamba_indices: Any = None) -> dict[str, Any]:
        """Copy a request's whole cache to the host.

        Args:
            indices: int64 [tokens], its slots from position 0 on.
            mamba_indices: Unused; SGLang passes it to every pool.

        Returns:
            What `load_cpu_copy` takes.
        """
        pages = indices[::PAGE_SIZE].long() // PAGE_SIZE
        open_slot = self.open_slots.held_slot(pages[-1:])
        sink_slot = self.sink_slots.held_slot(pages[:1])
        return {
            "num_tokens": len(indices),
            "pages": [layer.pages[pages].cpu() for layer in self._layers],
            "open_rows": [layer.open_rows[open_slot].cpu() for layer in self._layers],
            "sink_rows": [layer.sink_rows[sink_slot].cpu() for layer in self._layers],
        }

    def load_cpu_copy(
        self, kv_cache_cpu: dict[str, Any], indices: torch.Tensor, mamba_indices: Any = None
    ) -> None:
        """Write what `get_cpu_copy` returned into freshly allocated slots.

        Args:
            kv_cache_cpu: The copy.
            indices: int64 [tokens], the new slots, from position 0 on.
            mamba_indices: Unused.

        Raises:
            ValueError: another number of tokens than was copied.
        """
        if len(indices) != kv_cache_cpu["num_tokens"]:
            raise ValueError(
                f"indices: expected {kv_cache_cpu['num_tokens']} slots, got {len(indices)}"
            )
        pages = indices[::PAGE_SIZE].long() // PAGE_SIZE
        open_slot = self.open_slots.held_slot(pages[-1:])
        sink_slot = self.sink_slots.held_slot(pages[:1])
        for i, layer in enumerate(self._layers):
            layer.pages[pages] = kv_cache_cpu["pages"][i].to(self.device)
            layer.open_rows[open_slot] = kv_cache_cpu["open_rows"][i].to(self.device)
            layer.sink_rows[sink_slot] = kv_cache_cpu["sink_rows"][i].to(self.device)

    def move_kv_cache(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        """Move tokens between slots: rows inside open pages, or whole closed pages.

        Args:
            tgt_loc: int64 [n], where to.
            src_loc: int64 [n], where from; read before anything is written.

        Raises:
            ValueError: part of a closed page would be moved: its tokens share scales.
        """
        tgt_pages, src_pages = tgt_loc.long() // PAGE_SIZE, src_loc.long() // PAGE_SIZE
        tgt_slots, src_slots = (
            self.open_slots.held_slot(pages) for pages in (tgt_pages, src_pages)
        )
        if bool((tgt_slots > 0).all() and (src_slots > 0).all()):
            tgt_row, src_row = tgt_loc % PAGE_SIZE, src_loc % PAGE_SIZE
            for layer in self._layers:
                layer.open_rows[tgt_slots, :, tgt_row] = layer.open_rows[src_slots, :, src_row]
            return
        whole = torch.arange(PAGE_SIZE, device=tgt_loc.device).repeat(len(tgt_loc) // PAGE_SIZE)
        if len(tgt_loc) % PAGE_SIZE or not all(
            torch.equal(loc.long() % PAGE_SIZE, whole) for loc in (tgt_loc, src_loc)
        ):
            raise ValueError(
                f"move_kv_cache: expected slots of open pages, or whole closed pages of "
                f"{PAGE_SIZE} slots, got {len(tgt_loc)} slots that split a closed page"
            )
        tgt, src = tgt_pages[::PAGE_SIZE], src_pages[::PAGE_SIZE]
        for layer in self._layers:
            layer.pages[tgt] = layer.pages[src]
        tgt_sink, src_sink = (self.sink_slots.held_slot(pages) for pages in (tgt, src))
        both = (tgt_sink > 0) & (src_sink > 0)
        for layer in self._layers:
            layer.sink_rows[tgt_sink[both]] = layer.sink_rows[src_sink[both]]

    def _clear_buffers(self) -> None:
        """Drop the storage (SGLang calls this before it rebuilds a pool)."""
        del self._layers

    def _refuse_raw_access(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Raise: K and V as tensors do not exist here.

        Raises:
            KvqError: always. Whatever asks for them bypasses the kvq attention backend.
        """
        raise KvqError(
            f"--kv-quant {self.layout.format.name}: this model or option reads or writes KV "
            f"outside of the kvq attention backend; run it without --kv-quant"
        )

    get_key_buffer = _refuse_raw_access
    get_value_buffer = _refuse_raw_access
    get_kv_buffer = _refuse_raw_access
    set_kv_buffer = _refuse_raw_access
