"""SGLang's paged allocator, which also gives pages their open slots and sink rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.host.cpu_platform.allocator import CpuPagedAllocator
from sgl_kvq.host.names import EvictParams, PagedTokenToKVPoolAllocator, get_num_new_pages
from sgl_kvq.host.pool import QuantizedKVPool
from sgl_kvq.memory_pool.store import PagedStore


class KvqPagedAllocator(PagedTokenToKVPoolAllocator):
    """A paged allocator that also rules the life of open slots and sink rows.

    A page holds an open slot from its first token until the step that writes its 64th. The page
    that holds position 0 of a sequence takes a second page row from the same free list, for its
    sink rows, as long as it lives. Everything that ends a page (finish, abort, retraction,
    eviction) goes through `_release_page_ids`.

    SGLang counts tokens, so `available_size` leaves sink rows out: `num_rows` less the rows set
    apart, less pages that hold tokens. Rows of cached sequences beyond those set apart are made by
    evicting more of the cache when an allocation needs them; those of running requests always fit.
    """

    _kvcache: QuantizedKVPool
    free_pages: torch.Tensor
    evictable_cache: Any = None
    """SGLang's prefix cache over the same pages; the plugin sets it before each allocation."""
    on_clear: Callable[[], None] | None = None
    """Called after everything was freed at once."""

    @property
    def store(self) -> PagedStore:
        """The memory this allocates from."""
        return self._kvcache.store

    def available_size(self) -> int:
        """Tokens that SGLang may still place, sink rows not counted."""
        uncounted = self.store.sink_pages.num_held - self.store.plan.sink_pages
        return int(super().available_size()) + uncounted * PAGE_SIZE

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
        """Allocate as the host does, then give last and first pages their rows in 16 bits."""
        if num_new_pages is None:
            num_new_pages = get_num_new_pages(
                seq_lens=seq_lens_cpu, page_size=PAGE_SIZE, prefix_lens=prefix_lens_cpu
            )
        begins = prefix_lens_cpu == 0
        num_sinks = int(begins.sum()) if self.store.plan.sink_tokens else 0
        if not self._make_room(num_new_pages, num_sinks):
            return None
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

        open_slots = self.store.open_slots
        open_slots.transfer(pick(prefix_page, moves), pick(last_page, moves))
        open_slots.acquire(pick(last_page, ends_open & ~starts_open))
        open_slots.release(pick(prefix_page, starts_open & ~ends_open))
        if num_sinks:
            self.store.sink_pages.attach(pick(first_page, begins), self.free_pages[:num_sinks])
            self.free_pages = self.free_pages[num_sinks:]
        return out

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """Allocate as the host does; pages that begin take a slot, pages that close give it up."""
        begins = (seq_lens_cpu % PAGE_SIZE == 1).nonzero().squeeze(1)
        if not self._make_room(len(begins)):
            return None
        out = super().alloc_decode(seq_lens, seq_lens_cpu, last_loc)
        if out is None:
            return None
        closes = (seq_lens_cpu % PAGE_SIZE == 0).nonzero().squeeze(1)
        self.store.open_slots.acquire(out[begins.to(out.device)] // PAGE_SIZE)
        self.store.open_slots.release(out[closes.to(out.device)] // PAGE_SIZE)
        return out

    def _make_room(self, num_pages: int, num_sinks: int = 0) -> bool:
        """Have so many page rows free: merge, take back sink rows, evict cached sequences.

        Returns:
            False if running requests hold the rest.
        """
        if num_pages * PAGE_SIZE > self.available_size():
            return False  # rows set apart for sink rows are not for tokens
        num_pages += num_sinks
        while len(self.free_pages) < num_pages:
            if self.store.sink_pages.num_given_up:
                super()._release_page_ids(self.store.sink_pages.reclaim())
            self.merge_and_sort_free()
            missing = num_pages - len(self.free_pages)
            if missing > 0 and not self._evict(missing):
                return False
        return True

    def _evict(self, num_pages: int) -> bool:
        """Evict cached sequences of at least so many pages; False if nothing can be evicted."""
        if self.evictable_cache is None or self.evictable_cache.evictable_size() == 0:
            return False
        before = self.evictable_cache.evictable_size()
        self.evictable_cache.evict(EvictParams(num_tokens=num_pages * PAGE_SIZE))
        return bool(self.evictable_cache.evictable_size() < before)

    def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
        for pages in page_ids:
            self.store.open_slots.release(pages)
            self.store.sink_pages.detach(pages)
        super()._release_page_ids(*page_ids)

    def clear(self) -> None:
        """Free every page, open slot and sink row."""
        self.store.open_slots.clear()
        self.store.sink_pages.clear()
        self.num_pages = self.store.plan.num_rows
        super().clear()
        if self.on_clear is not None:
            self.on_clear()


class KvqCpuPagedAllocator(KvqPagedAllocator, CpuPagedAllocator):
    """The same without Triton kernels."""
