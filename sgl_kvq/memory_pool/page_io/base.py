"""The interface through which spans of a pool are read and written."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from sgl_kvq.errors import SlotNotHeldError, SpanError
from sgl_kvq.memory_pool.page_io.span import (
    Buffer,
    Bytes,
    HeadRange,
    PageIds,
    PageSpan,
    SpanKind,
)

if TYPE_CHECKING:
    import torch

    from sgl_kvq.memory_pool.sinks import SinkPages
    from sgl_kvq.memory_pool.slots import SlotTable
    from sgl_kvq.memory_pool.store import PagedStore


class PoolAccess(ABC):
    """Reads spans of a pool into bytes and writes bytes to spans of it.

    Args:
        pool: The pool of this rank.
        heads: KV heads it holds.

    Attributes:
        shareable: Whether several threads may read and write at the same time.
    """

    shareable = False

    def __init__(self, pool: PagedStore, heads: HeadRange) -> None:
        self.pool = pool
        self.heads = heads
        self.layout = pool.layout
        self.num_layers = pool.plan.num_layers
        self._head_bytes = [layout.head_bytes for layout in pool.plan.layouts]

    def fence(self) -> list[Any]:
        """CUDA events after everything that is queued now; none in main memory."""
        return []

    @abstractmethod
    def held_rows(self, pages: PageIds, fence: list[Any]) -> frozenset[SpanKind]:
        """Kinds of 16-bit rows that pages of one sequence hold a slot for.

        Args:
            pages: int64 [n], n > 0; the first may hold sink rows, the last an open slot.
            fence: Taken after the pages were allocated.

        Returns:
            Any of OPEN_ROWS and SINK_ROWS.
        """

    @abstractmethod
    def new_buffer(self, nbytes: int) -> Bytes:
        """Memory to read spans into; page-locked for a GPU."""

    @abstractmethod
    def view(self, span: PageSpan, heads: HeadRange) -> Bytes | None:
        """The bytes of a span where they lie, if that is one piece of main memory."""

    @abstractmethod
    def read(self, span: PageSpan, heads: HeadRange, out: Bytes) -> None:
        """Copy a span out of the pool.

        Args:
            span: What to read.
            heads: KV heads to read, among those of this rank.
            out: uint8 [span_bytes], a slice of `new_buffer`.

        Raises:
            SlotNotHeldError: the page of 16-bit rows holds no slot.
        """

    @abstractmethod
    def write(self, span: PageSpan, heads: HeadRange, data: Buffer) -> None:
        """Copy bytes into the pool; they are there when this returns.

        Args:
            span: Where to write; inside the pool.
            heads: KV heads that the bytes are of, among those of this rank.
            data: `span_bytes` bytes.

        Raises:
            SpanError: another number of bytes.
            SlotNotHeldError: the page of 16-bit rows holds no slot.
        """

    def span_bytes(self, span: PageSpan, heads: HeadRange) -> int:
        """Bytes of these heads of a span."""
        return math.prod(self._shape(span, heads))

    def row_bytes(self, heads: HeadRange) -> int:
        """K and V of a token in one layer, in 16 bits."""
        return 2 * heads.count * self.layout.head_dim * self.layout.row_dtype.itemsize

    def _shape(self, span: PageSpan, heads: HeadRange) -> tuple[int, ...]:
        """uint8 shape of these heads of a span."""
        if span.kind is SpanKind.PAGES:
            return (span.num_layers, len(span.pages), heads.count * self._page_head_bytes(span))
        head_bytes = self.layout.head_dim * self.layout.row_dtype.itemsize
        return (span.num_layers, 2, span.num_rows, heads.count, head_bytes)

    def _page_head_bytes(self, span: PageSpan) -> int:
        """Bytes of a head in a page, the same in all layers of a span.

        Raises:
            SpanError: they differ.
        """
        sizes = self._head_bytes[span.layers]
        if not sizes or sizes.count(sizes[0]) != len(sizes):
            raise SpanError(
                f"layers {span.first_layer} to {span.first_layer + span.num_layers}: expected "
                f"pages of one size, got {sorted(set(sizes))} bytes a head"
            )
        return sizes[0]

    def _page_columns(self, span: PageSpan, heads: HeadRange) -> slice:
        """Bytes of a page row that hold these heads."""
        width, part = self._page_head_bytes(span), heads.within(self.heads)
        return slice(part.start * width, part.stop * width)

    def _array(self, span: PageSpan, heads: HeadRange, data: Buffer) -> Bytes:
        """Bytes to write, in the span's shape.

        Raises:
            SpanError: another number of bytes.
        """
        shape = self._shape(span, heads)
        if len(data) != math.prod(shape):
            raise SpanError(f"{span.kind.name}: expected {math.prod(shape)} bytes, got {len(data)}")
        return np.frombuffer(data, dtype=np.uint8).reshape(shape)

    def _rows(self, kind: SpanKind, layer: int) -> torch.Tensor:
        """Storage of 16-bit rows of a layer, [slots, 2, rows, heads, head_dim]."""
        cache = self.pool.layers[layer]
        return cache.open_rows if kind is SpanKind.OPEN_ROWS else cache.sink_rows

    def _held_slot(self, kind: SpanKind, page: torch.Tensor) -> int:
        """The slot that a page (int64 [1], on the pool's device) holds now.

        Raises:
            SlotNotHeldError: it holds none.
        """
        pool = self.pool
        table: SlotTable | SinkPages
        table = pool.open_slots if kind is SpanKind.OPEN_ROWS else pool.sink_pages
        slot = int(table.held_slot(page))
        if slot == 0:
            raise SlotNotHeldError(f"page {int(page)} holds no slot of {table.name}")
        return slot
