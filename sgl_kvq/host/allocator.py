"""SGLang's paged allocator, which also hands open and sink slots to the pages it allocates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.host.cpu_platform.allocator import CpuPagedAllocator
from sgl_kvq.host.names import EvictParams, PagedTokenToKVPoolAllocator
from sgl_kvq.host.pool import QuantizedKVPool
from sgl_kvq.memory_pool.store import PagedStore


class KvqPagedAllocator(PagedTokenToKVPoolAllocator):
    """A paged allocator that also rules the life of open and sink slots.

    A page holds an open slot from its first token until the step that writes its 64th, and a sink
    slot as long as it lives if it holds position 0. Everything that ends a page (finish, abort,
    retraction, eviction) goes through `_release_page_ids`.
    """

    _kvcache: QuantizedKVPool
    on_clear: Callable[[], None] | None = None
    """Called after everything was freed at once."""

    @property
    def store(self) -> PagedStore:
        """The memory this allocates from."""
        return self._kvcache.store

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Allocate as the host does, then give last and first pages their slots."""
        out = super().alloc_extend(
            prefix_lens,
            prefix_lens_cpu,
            seq_lens,
            seq_lens_cpu,
            last_loc,
            extend_num_tokens,
            num_new_pages,
        )
        if out is None or extend_num_tokens == 0:
            return out  # a decode instance may have all pages of a prompt already
        end = torch.cumsum(seq_lens_cpu - prefix_lens_cpu, 0)
        last_page = out[(end - 1).to(out.device)] // PAGE_SIZE
        first_page = out[(end - (seq_lens_cpu - prefix_lens_cpu)).to(out.device)] // PAGE_SIZE
        prefix_page = last_loc.long() // PAGE_SIZE
        ends_open = seq_lens_cpu % PAGE_SIZE != 0
        starts_open = prefix_lens_cpu % PAGE_SIZE != 0
        same_page = (seq_lens_cpu - 1) // PAGE_SIZE == prefix_lens_cpu // PAGE_SIZE
        moves = starts_open & ends_open & ~same_page

        def pick(pages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return pages[mask.nonzero().squeeze(1).to(pages.device)]

        open_slots, sink_slots = self.store.open_slots, self.store.sink_slots
        open_slots.transfer(pick(prefix_page, moves), pick(last_page, moves))
        open_slots.acquire(pick(last_page, ends_open & ~starts_open))
        open_slots.release(pick(prefix_page, starts_open & ~ends_open))
        if self.store.plan.sink_tokens:
            sink_slots.acquire(pick(first_page, prefix_lens_cpu == 0))
        return out

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """Allocate as the host does; pages that begin take a slot, pages that close give it up."""
        out = super().alloc_decode(seq_lens, seq_lens_cpu, last_loc)
        if out is None:
            return None
        begins = (seq_lens_cpu % PAGE_SIZE == 1).nonzero().squeeze(1).to(out.device)
        closes = (seq_lens_cpu % PAGE_SIZE == 0).nonzero().squeeze(1).to(out.device)
        self.store.open_slots.acquire(out[begins] // PAGE_SIZE)
        self.store.open_slots.release(out[closes] // PAGE_SIZE)
        return out

    def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
        for pages in page_ids:
            self.store.open_slots.release(pages)
            self.store.sink_slots.release(pages)
        super()._release_page_ids(*page_ids)

    def clear(self) -> None:
        """Free every page and slot."""
        self.store.open_slots.clear()
        self.store.sink_slots.clear()
        super().clear()
        if self.on_clear is not None:
            self.on_clear()


class KvqCpuPagedAllocator(KvqPagedAllocator, CpuPagedAllocator):
    """The same without Triton kernels."""


def make_room_for_first_pages(tree_cache: Any, num_first_pages: int) -> None:
    """Evict cached sequences until as many sink slots are free as new sequences begin.

    Sink slots are fewer than pages. Those of running requests are always covered, so evicting
    unused leaves ends with enough.

    Args:
        tree_cache: The host's prefix cache.
        num_first_pages: Sequences of the next batch that have no cached prefix.
    """
    allocator = tree_cache.token_to_kv_pool_allocator
    if not isinstance(allocator, KvqPagedAllocator) or allocator.store.plan.sink_tokens == 0:
        return
    sink_slots = allocator.store.sink_slots
    while (missing := num_first_pages - sink_slots.num_free()) > 0:
        before = tree_cache.evictable_size()
        tree_cache.evict(EvictParams(num_tokens=missing * PAGE_SIZE))
        if tree_cache.evictable_size() == before:
            return
