"""The quantized pool behind SGLang's `KVCache` interface."""

from __future__ import annotations

import logging
from typing import Any, NoReturn

import torch

from sgl_kvq.errors import KvqError
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.host.names import GPU_MEMORY_TYPE_KV_CACHE, KVCache
from sgl_kvq.memory_pool.capacity import PoolPlan
from sgl_kvq.memory_pool.store import PagedStore

logger = logging.getLogger(__name__)


class QuantizedKVPool(KVCache):
    """SGLang's view of a `PagedStore`.

    Args:
        plan: Sizes.
        device: Where everything lives.
        start_layer: First layer of this rank.
        enable_memory_saver: SGLang's option of that name.

    Attributes:
        store: The memory.
    """

    def __init__(
        self, plan: PoolPlan, device: str, start_layer: int = 0, enable_memory_saver: bool = False
    ) -> None:
        layout = plan.layout
        super().__init__(
            plan.num_tokens,
            PAGE_SIZE,
            torch.uint8,  # of pages; with 16 bits some models would write K and V by themselves
            plan.num_layers,
            device,
            enable_memory_saver,
            start_layer,
            start_layer + plan.num_layers - 1,
        )
        self.head_num, self.head_dim = layout.num_kv_heads, layout.head_dim
        region = self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE)
        self.store = PagedStore(plan, device, start_layer, region)
        self.mem_usage = self.get_kv_size_bytes() / 2**30
        logger.info(plan.describe())

    @property
    def plan(self) -> PoolPlan:
        """Sizes."""
        return self.store.plan

    def get_kv_size_bytes(self) -> int:
        """Bytes allocated, open pages and sink rows included."""
        return self.plan.total_bytes

    def get_contiguous_buf_infos(self) -> tuple[list[int], list[int], list[int]]:
        """Describe the closed pages: address, bytes and bytes per page of each layer."""
        buffers = [layer.pages for layer in self.store.layers]
        return (
            [buffer.data_ptr() for buffer in buffers],
            [buffer.nbytes for buffer in buffers],
            [layout.page_bytes for layout in self.plan.layouts],
        )

    def get_cpu_copy(
        self, indices: torch.Tensor, mamba_indices: Any = None, req_pool_index: Any = None
    ) -> dict[str, Any]:
        """Copy a request's whole cache to the host; see `PagedStore.copy_to_host`.

        The last two arguments are SGLang's, for pools with state beside K and V.
        """
        return self.store.copy_to_host(indices)

    def load_cpu_copy(
        self,
        kv_cache_cpu: dict[str, Any],
        indices: torch.Tensor,
        mamba_indices: Any = None,
        req_pool_index: Any = None,
    ) -> None:
        """Bring a request back from the host; see `PagedStore.copy_from_host`."""
        self.store.copy_from_host(kv_cache_cpu, indices)

    def move_kv_cache(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        """Move tokens between slots; see `PagedStore.move`."""
        self.store.move(tgt_loc, src_loc)

    def _clear_buffers(self) -> None:
        """Drop the storage (SGLang calls this before it rebuilds a pool)."""
        del self.store

    def _refuse_raw_access(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Raise: K and V as tensors do not exist here.

        Raises:
            KvqError: always. Whatever asks for them bypasses the kvq attention backend.
        """
        raise KvqError(
            f"--kv-quant {self.plan.layout.format.name}: this model or option reads or writes KV "
            f"outside of the kvq attention backend; run it without --kv-quant"
        )

    get_key_buffer = _refuse_raw_access
    get_value_buffer = _refuse_raw_access
    get_kv_buffer = _refuse_raw_access
    set_kv_buffer = _refuse_raw_access
