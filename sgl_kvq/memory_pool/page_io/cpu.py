"""Access to a pool in main memory: NumPy copies whole rows, where PyTorch copies elements."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from typing_extensions import override

from sgl_kvq.memory_pool.page_io.base import PoolAccess
from sgl_kvq.memory_pool.page_io.span import (
    Buffer,
    Bytes,
    HeadRange,
    PageIds,
    PageSpan,
    SpanKind,
    contiguous_slice,
)
from sgl_kvq.memory_pool.store import PagedStore


class CpuPoolAccess(PoolAccess):
    """A pool in main memory, as arrays of bytes.

    Args:
        pool: The pool of this rank.
        heads: KV heads it holds.
    """

    shareable = True

    def __init__(self, pool: PagedStore, heads: HeadRange) -> None:
        super().__init__(pool, heads)
        self._page_arrays: list[Bytes] = [layer.pages.numpy() for layer in pool.layers]
        self._row_arrays: dict[SpanKind, list[Bytes]] = {
            kind: [self._rows(kind, i).view(torch.uint8).numpy() for i in range(self.num_layers)]
            for kind in (SpanKind.OPEN_ROWS, SpanKind.SINK_ROWS)
        }

    @override
    def held_rows(self, pages: PageIds, fence: list[Any]) -> frozenset[SpanKind]:
        ids = torch.from_numpy(pages)
        held = {
            SpanKind.SINK_ROWS: self.pool.sink_pages.held_slot(ids[:1]),
            SpanKind.OPEN_ROWS: self.pool.open_slots.held_slot(ids[-1:]),
        }
        return frozenset(kind for kind, slot in held.items() if int(slot))

    @override
    def new_buffer(self, nbytes: int) -> Bytes:
        return np.empty(nbytes, dtype=np.uint8)

    @override
    def view(self, span: PageSpan, heads: HeadRange) -> Bytes | None:
        """The pages of one layer with all heads, if they follow each other."""
        if span.kind is not SpanKind.PAGES or span.num_layers != 1 or heads != self.heads:
            return None
        pages = contiguous_slice(span.pages)
        return None if pages is None else self._page_arrays[span.first_layer][pages].reshape(-1)

    @override
    def read(self, span: PageSpan, heads: HeadRange, out: Bytes) -> None:
        targets = out.reshape(self._shape(span, heads))
        if span.kind is SpanKind.PAGES:
            columns = self._page_columns(span, heads)
            for array, target in zip(self._page_arrays[span.layers], targets, strict=True):
                if target.shape[1] == array.shape[1]:
                    np.take(array, span.pages, axis=0, out=target, mode="clip")
                else:  # `take` would copy the whole array to make these columns contiguous
                    target[:] = array[span.pages, columns]
            return
        slot = self._held_slot(span.kind, torch.from_numpy(span.pages))
        part = heads.within(self.heads)
        for array, target in zip(self._row_arrays[span.kind][span.layers], targets, strict=True):
            target[:] = array[slot, :, : span.num_rows, part]

    @override
    def write(self, span: PageSpan, heads: HeadRange, data: Buffer) -> None:
        if span.kind is SpanKind.PAGES:
            self._write_pages(span, heads, data)
            return
        sources = self._array(span, heads, data)
        slot = self._held_slot(span.kind, torch.from_numpy(span.pages))
        part = heads.within(self.heads)
        for array, values in zip(self._row_arrays[span.kind][span.layers], sources, strict=True):
            array[slot, :, : span.num_rows, part] = values

    def _write_pages(self, span: PageSpan, heads: HeadRange, data: Buffer) -> None:
        pages = contiguous_slice(span.pages)
        if pages is not None and span.num_layers == 1 and heads.count == self.heads.count:
            target = self._page_arrays[span.first_layer][pages].reshape(-1)  # one copy
            if len(target) == len(data):
                target[:] = np.frombuffer(data, dtype=np.uint8)
                return
        sources = self._array(span, heads, data)
        columns = self._page_columns(span, heads)
        for array, values in zip(self._page_arrays[span.layers], sources, strict=True):
            array[pages or span.pages, columns] = values
