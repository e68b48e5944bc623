"""Reads blocks from a pool on a GPU and writes them to one."""

from __future__ import annotations

from typing import Any

import torch

from sgl_kvq.memory_pool.page_io.cpu import Bytes, CpuPoolAccess, PoolAccess
from sgl_kvq.memory_pool.store import PagedStore
from sgl_kvq.transfer.blocks import Block, HeadRange, PageIds, run_of
from sgl_kvq.transfer.protocol.header import BlockHeader, BlockKind, Buffer


def open_pool(
    pool: PagedStore, heads: HeadRange, forward_stream: Any = None
) -> CpuPoolAccess | GpuPoolAccess:
    """The way to a rank's pool for its transfer thread.

    Args:
        pool: The pool of this rank.
        heads: KV heads it holds.
        forward_stream: CUDA stream that the model runs on; None for the current one.
    """
    if str(pool.device).startswith("cpu"):
        return CpuPoolAccess(pool, heads)
    return GpuPoolAccess(pool, heads, forward_stream)


class GpuPoolAccess(PoolAccess):
    """A pool on a GPU: a stream of its own, page-locked memory, waits in the transfer thread only.

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

    def fence(self) -> list[Any]:
        """As the base: after the caller's stream and the model's."""
        events = []
        for stream in (torch.cuda.current_stream(self.pool.device), self._forward_stream):
            if stream is not None:
                event = torch.cuda.Event()
                event.record(stream)
                events.append(event)
        return events

    def held_slots(self, pages: PageIds, fence: list[Any]) -> tuple[int, int]:
        """As the base."""
        with torch.cuda.stream(self._stream):
            self._wait(fence)
            ends = torch.from_numpy(pages[[0, -1]]).to(self.pool.device)
            sink = self.pool.sink_slots.held_slot(ends[:1])
            open_slot = self.pool.open_slots.held_slot(ends[1:])
            first, last = torch.cat([sink, open_slot]).tolist()
        return first, last

    def new_buffer(self, nbytes: int) -> Bytes:
        """As the base."""
        array: Bytes = self._pinned(nbytes).numpy()
        return array

    def _pinned(self, nbytes: int) -> torch.Tensor:
        with torch.cuda.device(self.pool.device):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def _wait(self, events: list[Any]) -> None:
        for event in events:
            self._stream.wait_event(event)

    def view(self, block: Block, heads: HeadRange) -> Bytes | None:
        """As the base: never."""
        return None

    def read(self, block: Block, heads: HeadRange, out: Bytes) -> None:
        """As the base."""
        target = torch.from_numpy(out)
        with torch.cuda.stream(self._stream):
            self._wait([] if block.ready is None else [block.ready])
            if block.kind is BlockKind.PAGES:
                source = self._gather_pages(block, heads)
            else:
                page = torch.from_numpy(block.pages[:1]).to(self.pool.device)
                slot = int(self.table(block.kind).held_slot(page))
                part = heads.within(self.heads)
                layers = range(block.first_layer, block.first_layer + block.num_layers)
                source = torch.stack(
                    [self.rows(block.kind, i)[slot, :, : block.num_rows, part] for i in layers]
                )
            target.copy_(source.view(-1).view(torch.uint8), non_blocking=True)
        self._stream.synchronize()

    def _gather_pages(self, block: Block, heads: HeadRange) -> torch.Tensor:
        """Payload on the device, int64; of one run and layer, the pool itself."""
        words = self._words[block.first_layer : block.first_layer + block.num_layers]
        columns = self._word_columns(block, heads)
        run = run_of(block.pages)
        if run is not None:
            parts = [layer[run, columns] for layer in words]
            return parts[0].contiguous() if len(parts) == 1 else torch.stack(parts)
        pages = torch.from_numpy(block.pages).to(self.pool.device, non_blocking=True)
        shape = (len(words), block.num_pages, columns.stop - columns.start)
        out = torch.empty(shape, dtype=torch.int64, device=self.pool.device)
        for layer, target in zip(words, out, strict=True):
            torch.index_select(layer[:, columns], 0, pages, out=target)
        return out

    def _word_columns(self, block: Block | BlockHeader, heads: HeadRange) -> slice:
        columns = self.columns(
            heads, self.head_bytes(block)
        )  # multiples of 16 bytes: docs/kv_layout.md
        return slice(columns.start // 8, columns.stop // 8)

    def write(self, header: BlockHeader, payload: Buffer, place: PageIds) -> None:
        """As the base; waits until it is there, so that nothing is written after the caller."""
        source = self.payload(header, payload)
        if len(self._staging) < source.nbytes:
            self._staging = self._pinned(source.nbytes)
        staged = self._staging[: source.nbytes]
        staged.numpy()[:] = source.reshape(-1)
        heads = HeadRange(header.first_head, header.first_head + header.num_heads)
        with torch.cuda.stream(self._stream):
            values = staged.to(self.pool.device, non_blocking=True)
            if header.kind is BlockKind.PAGES:
                words = values.view(torch.int64).view(*source.shape[:2], -1)
                columns = self._word_columns(header, heads)
                self._scatter_pages(header.first_layer, words, columns, place)
            else:
                part, slot = heads.within(self.heads), int(place[0])
                rows = values.view(self.layout.row_dtype).view(*source.shape[:4], -1)
                for i, layer_rows in enumerate(rows, header.first_layer):
                    target = self.rows(header.kind, i)
                    target[slot, :, : header.num_rows, part] = layer_rows
        self._stream.synchronize()

    def _scatter_pages(
        self, first_layer: int, words: torch.Tensor, columns: slice, place: PageIds
    ) -> None:
        run = run_of(place)
        pages = (
            None
            if run is not None
            else torch.from_numpy(place).to(self.pool.device, non_blocking=True)
        )
        for layer, values in zip(self._words[first_layer:], words, strict=False):
            if pages is None:
                layer[run, columns] = values
            else:
                layer[:, columns].index_copy_(0, pages, values)
