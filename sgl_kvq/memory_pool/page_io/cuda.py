"""Access to a pool on a GPU, through page-locked memory and a stream of its own."""

from __future__ import annotations

from typing import Any

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


class CudaPoolAccess(PoolAccess):
    """A pool on a GPU; one thread reads and writes, and waits for the device itself.

    Args:
        pool: The pool of this rank.
        heads: KV heads it holds.
        forward_stream: CUDA stream that the model runs on; None for the current one.
    """

    def __init__(self, pool: PagedStore, heads: HeadRange, forward_stream: Any) -> None:
        super().__init__(pool, heads)
        # What runs here is short and a network waits for it.
        self._stream = torch.cuda.Stream(device=pool.device, priority=-1)
        self._forward_stream = forward_stream
        # Whole words: PyTorch's index kernels move one element a thread.
        self._words = [layer.pages.view(torch.int64) for layer in pool.layers]
        self._staging = self._pinned(0)

    @override
    def fence(self) -> list[Any]:
        """CUDA events after what is queued on the caller's stream and on the model's."""
        events = []
        for stream in (torch.cuda.current_stream(self.pool.device), self._forward_stream):
            if stream is not None:
                event = torch.cuda.Event()
                event.record(stream)
                events.append(event)
        return events

    @override
    def held_rows(self, pages: PageIds, fence: list[Any]) -> frozenset[SpanKind]:
        with torch.cuda.stream(self._stream):
            self._wait(fence)
            ends = self._on_device(pages[[0, -1]])
            sink = self.pool.sink_pages.held_slot(ends[:1])
            open_slot = self.pool.open_slots.held_slot(ends[1:])
            held = dict(
                zip(
                    (SpanKind.SINK_ROWS, SpanKind.OPEN_ROWS),
                    torch.cat([sink, open_slot]).tolist(),
                    strict=True,
                )
            )
        return frozenset(kind for kind, slot in held.items() if slot)

    @override
    def new_buffer(self, nbytes: int) -> Bytes:
        array: Bytes = self._pinned(nbytes).numpy()
        return array

    @override
    def view(self, span: PageSpan, heads: HeadRange) -> Bytes | None:
        return None

    @override
    def read(self, span: PageSpan, heads: HeadRange, out: Bytes) -> None:
        target = torch.from_numpy(out)
        with torch.cuda.stream(self._stream):
            self._wait([] if span.ready is None else [span.ready])
            if span.kind is SpanKind.PAGES:
                source = self._gather_pages(span, heads)
            else:
                slot = self._held_slot(span.kind, self._on_device(span.pages))
                part = heads.within(self.heads)
                layers = range(span.first_layer, span.first_layer + span.num_layers)
                source = torch.stack(
                    [self._rows(span.kind, i)[slot, :, : span.num_rows, part] for i in layers]
                )
            target.copy_(source.view(-1).view(torch.uint8), non_blocking=True)
        self._stream.synchronize()

    @override
    def write(self, span: PageSpan, heads: HeadRange, data: Buffer) -> None:
        source = self._array(span, heads, data)
        if len(self._staging) < source.nbytes:
            self._staging = self._pinned(source.nbytes)
        staged = self._staging[: source.nbytes]
        staged.numpy()[:] = source.reshape(-1)
        with torch.cuda.stream(self._stream):
            values = staged.to(self.pool.device, non_blocking=True)
            if span.kind is SpanKind.PAGES:
                words = values.view(torch.int64).view(*source.shape[:2], -1)
                self._scatter_pages(span, heads, words)
            else:
                slot = self._held_slot(span.kind, self._on_device(span.pages))
                part = heads.within(self.heads)
                rows = values.view(self.layout.row_dtype).view(*source.shape[:4], -1)
                for i, layer_rows in enumerate(rows, span.first_layer):
                    self._rows(span.kind, i)[slot, :, : span.num_rows, part] = layer_rows
        self._stream.synchronize()

    def _gather_pages(self, span: PageSpan, heads: HeadRange) -> torch.Tensor:
        """Bytes of the span on the device, int64; of consecutive pages in one layer, a view."""
        words, columns = self._words[span.layers], self._word_columns(span, heads)
        consecutive = contiguous_slice(span.pages)
        if consecutive is not None:
            parts = [layer[consecutive, columns] for layer in words]
            return parts[0].contiguous() if len(parts) == 1 else torch.stack(parts)
        pages = self._on_device(span.pages)
        shape = (len(words), len(pages), columns.stop - columns.start)
        out = torch.empty(shape, dtype=torch.int64, device=self.pool.device)
        for layer, target in zip(words, out, strict=True):
            torch.index_select(layer[:, columns], 0, pages, out=target)
        return out

    def _scatter_pages(self, span: PageSpan, heads: HeadRange, words: torch.Tensor) -> None:
        """Write int64 [layers, pages, words] to the span."""
        columns = self._word_columns(span, heads)
        consecutive = contiguous_slice(span.pages)
        pages = None if consecutive is not None else self._on_device(span.pages)
        for layer, values in zip(self._words[span.layers], words, strict=True):
            if pages is None:
                layer[consecutive, columns] = values
            else:
                layer[:, columns].index_copy_(0, pages, values)

    def _word_columns(self, span: PageSpan, heads: HeadRange) -> slice:
        """Words of a page row; heads begin at multiples of 16 bytes (docs/kv_layout.md)."""
        columns = self._page_columns(span, heads)
        return slice(columns.start // 8, columns.stop // 8)

    def _on_device(self, pages: PageIds) -> torch.Tensor:
        return torch.from_numpy(pages).to(self.pool.device, non_blocking=True)

    def _pinned(self, nbytes: int) -> torch.Tensor:
        with torch.cuda.device(self.pool.device):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def _wait(self, events: list[Any]) -> None:
        for event in events:
            self._stream.wait_event(event)
