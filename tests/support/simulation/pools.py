"""Small pools: pages that are taken and given back, with known bytes in all of them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.registry import get_format
from sgl_kvq.memory_pool.capacity import PoolPlan
from sgl_kvq.memory_pool.page_io.cpu import CpuPoolAccess
from sgl_kvq.memory_pool.page_io.span import Bytes, HeadRange, PageIds, PageSpan, SpanKind
from sgl_kvq.memory_pool.store import PagedStore
from tests.support.simulation.network import Network
from tests.support.sink_rows import give_sink_rows, take_back

NUM_LAYERS, HEAD_DIM, SINK_TOKENS = 2, 64, 4
NUM_PAGES, OPEN_SLOTS = 40, 8
POISON = 0xEE
_NOISE = np.random.default_rng(0).integers(0, 256, 2**21, dtype=np.uint8)


@cache
def page_layout(num_heads: int) -> PageLayout:
    return PageLayout(get_format("hack2"), HEAD_DIM, num_heads)


_stores: dict[int, list[PagedStore]] = defaultdict(list)
"""Memory of pools that are no longer used, by number of heads: allocating it takes the longest."""


def _take_store(num_heads: int) -> PagedStore:
    if _stores[num_heads]:
        store = _stores[num_heads].pop()
        store.open_slots.clear()
        store.sink_pages.clear()
        return store
    layouts = (page_layout(num_heads),) * NUM_LAYERS
    return PagedStore(PoolPlan(layouts, SINK_TOKENS, NUM_PAGES, OPEN_SLOTS), device="cpu")


@dataclass(frozen=True)
class Content:
    """The KV of a prompt, over all heads, as bytes of pages and rows.

    Args:
        closed: uint8 [layers, pages, heads, head bytes].
        open_rows: uint8 [layers, 2, rows, heads, row bytes]; no rows if all pages are closed.
        sink_rows: Of the same shape, of the first tokens.
    """

    closed: Bytes
    open_rows: Bytes
    sink_rows: Bytes

    @classmethod
    def draw(cls, number: int, num_tokens: int, num_heads: int) -> Content:
        """That of one request; others differ everywhere."""
        pages, rows = divmod(num_tokens, PAGE_SIZE)

        def noise(part: int, *shape: int) -> Bytes:
            size = int(np.prod(shape))
            start = (number * 7919 + part * 104729) % (len(_NOISE) - size)
            return _NOISE[start : start + size].reshape(shape)

        layers, row_bytes = NUM_LAYERS, 2 * HEAD_DIM
        return cls(
            noise(0, layers, pages, num_heads, page_layout(1).page_bytes),
            noise(1, layers, 2, rows, num_heads, row_bytes),
            noise(2, layers, 2, SINK_TOKENS if pages else 0, num_heads, row_bytes),
        )


class SimulatedPool(CpuPoolAccess):
    """The pool of a rank, in which every page that nobody holds is poisoned.

    Args:
        network: Knows which memory sockets hold.
        heads: KV heads of the rank.
    """

    def __init__(self, network: Network, heads: HeadRange) -> None:
        super().__init__(_take_store(heads.count), heads)
        self._network = network
        self.sinks: dict[int, int] = {}  # page row with the sink rows, by first page
        for layer in range(NUM_LAYERS):
            self._page_arrays[layer][:] = POISON
            self._row_arrays[SpanKind.OPEN_ROWS][layer][:] = POISON

    def release(self) -> None:
        """Let another seed have the memory."""
        _stores[self.heads.count].append(self.pool)

    @override
    def read(self, span: PageSpan, heads: HeadRange, out: Bytes) -> None:
        if self._network.held[id(out.base)]:
            self._network.world.violate("a buffer is filled again while ZeroMQ holds it")
        super().read(span, heads, out)

    def take(self, pages: PageIds, num_tokens: int, is_first: bool) -> None:
        """Give these free pages the slots that SGLang's allocator would give them."""
        if not self._untouched(pages):
            self._network.world.violate(f"free pages {pages.tolist()} were written")
        if num_tokens % PAGE_SIZE and len(pages):
            self.pool.open_slots.acquire(torch.from_numpy(pages[-1:]))
        if is_first and len(pages):
            self.sinks[int(pages[0])] = give_sink_rows(self.pool, torch.from_numpy(pages[:1]))

    def give(self, pages: PageIds) -> None:
        """Free pages, and poison them."""
        if not len(pages):
            return
        slot = self._open_slot(pages)
        rows = self._rows_of_sinks(pages)
        take_back(self.pool, torch.from_numpy(pages))
        for layer in range(NUM_LAYERS):
            self._page_arrays[layer][pages] = POISON
            self._page_arrays[layer][rows] = POISON
            if slot:
                self._row_arrays[SpanKind.OPEN_ROWS][layer][slot] = POISON
        self.sinks.pop(int(pages[0]), None)

    def _open_slot(self, pages: PageIds) -> int:
        return int(self.pool.open_slots.held_slot(torch.from_numpy(pages[-1:])))

    def _rows_of_sinks(self, pages: PageIds) -> list[int]:
        return [self.sinks[int(pages[0])]] if int(pages[0]) in self.sinks else []

    def _untouched(self, pages: PageIds) -> bool:
        return all(bool((array[pages] == POISON).all()) for array in self._page_arrays)

    def check_free(self, free: list[int]) -> None:
        """Nobody has written a page that is free."""
        if not self._untouched(np.array(free)):
            self._network.world.violate("a free page was written")

    def fill(self, content: Content, pages: PageIds, first: int, end: int) -> None:
        """Write positions `first` to `end` of a prompt, as a prefill does.

        Args:
            content: The KV.
            pages: All pages of the prompt.
            first: Position of the first page to write.
            end: Position after the last one.
        """
        part = slice(self.heads.first, self.heads.end)
        num_closed = content.closed.shape[1]
        closed = slice(first, min(end, num_closed))
        for layer in range(NUM_LAYERS):
            source = content.closed[layer, closed, part]
            self._page_arrays[layer][pages[closed]] = source.reshape(
                len(source), self.layout.page_bytes
            )
            if first == 0 and num_closed:
                self._sink(pages, layer)[:] = content.sink_rows[layer][:, :, part]
            if end > num_closed:
                self._open(pages, layer, content)[:] = content.open_rows[layer][:, :, part]

    def check(self, content: Content, pages: PageIds, prefix: int, heads: HeadRange) -> str:
        """What differs from a prompt behind its prefix, in some heads; empty if nothing does.

        Args:
            content: The KV.
            pages: Pages of the prompt behind the prefix.
            prefix: Pages of the prefix.
            heads: Which to compare.
        """
        part, mine = slice(heads.first, heads.end), heads.within(self.heads)
        num_closed = content.closed.shape[1]
        closed = pages[: num_closed - prefix]
        for layer in range(NUM_LAYERS):
            rows = self._page_arrays[layer][closed].reshape(
                len(closed), self.heads.count, self.layout.head_bytes
            )
            if not np.array_equal(rows[:, mine], content.closed[layer, prefix:, part]):
                return f"closed pages of layer {layer}"
            if prefix == 0 and num_closed:
                sink = self._sink(pages, layer)[:, :, mine]
                if not np.array_equal(sink, content.sink_rows[layer][:, :, part]):
                    return f"sink rows of layer {layer}"
            if content.open_rows.shape[2]:
                rows = self._open(pages, layer, content)[:, :, mine]
                if not np.array_equal(rows, content.open_rows[layer][:, :, part]):
                    return f"open rows of layer {layer}"
        return ""

    def _sink(self, pages: PageIds, layer: int) -> Any:
        return self._row_arrays[SpanKind.SINK_ROWS][layer][self.sinks[int(pages[0])]]

    def _open(self, pages: PageIds, layer: int, content: Content) -> Any:
        slot, rows = self._open_slot(pages), content.open_rows.shape[2]
        return self._row_arrays[SpanKind.OPEN_ROWS][layer][slot][:, :rows]
