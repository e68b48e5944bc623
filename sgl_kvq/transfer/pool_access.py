"""Reads blocks from a pool and writes them to one, in main memory or on a GPU."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sgl_kvq.errors import WireError
from sgl_kvq.memory_pool.quantized_pool import QuantizedKVPool
from sgl_kvq.transfer.blocks import Block, HeadRange, PageIds, run_of
from sgl_kvq.transfer.wire import BlockHeader, BlockKind, Buffer

Bytes = npt.NDArray[np.uint8]


def open_pool(
    pool: QuantizedKVPool, heads: HeadRange, forward_stream: Any = None
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


class PoolAccess(ABC):
    """A pool as the transfer thread sees it.

    Args:
        pool: The pool of this rank.
        heads: KV heads it holds.
    """

    def __init__(self, pool: QuantizedKVPool, heads: HeadRange) -> None:
        self.pool = pool
        self.heads = heads
        self.layout = pool.layout
        self.num_layers = pool.plan.num_layers

    def fence(self) -> list[Any]:
        """CUDA events after everything that is queued now; none in main memory."""
        return []

    @abstractmethod
    def held_slots(self, pages: PageIds, fence: list[Any]) -> tuple[int, int]:
        """Sink slot of the first page and open slot of the last one, 0 where there is none.

        Args:
            pages: int64 [n], n > 0.
            fence: Taken after the slots were.
        """

    @abstractmethod
    def new_buffer(self, nbytes: int) -> Bytes:
        """Memory to read blocks into; page-locked for a GPU."""

    @abstractmethod
    def view(self, block: Block, heads: HeadRange) -> Bytes | None:
        """The bytes of a block where they lie, if that is one piece of main memory."""

    @abstractmethod
    def read(self, block: Block, heads: HeadRange, out: Bytes) -> None:
        """Copy a block out of the pool.

        Args:
            block: Which.
            heads: Which heads of it.
            out: uint8 [payload_bytes], of `new_buffer`.
        """

    @abstractmethod
    def write(self, header: BlockHeader, payload: Buffer, place: PageIds) -> None:
        """Copy a payload into the pool.

        Args:
            header: Says layers, heads and rows; ranges already checked.
            payload: Before the codec.
            place: int64, [num_pages] pages, or [1] slot.

        Raises:
            WireError: the payload does not have the size of its shape.
        """

    def payload_bytes(self, block: Block, heads: HeadRange) -> int:
        """Size of a block's payload before the codec."""
        layers = block.num_layers
        if block.kind is BlockKind.PAGES:
            return layers * block.num_pages * heads.count * self.layout.head_bytes
        return layers * block.num_rows * self.row_bytes(heads)

    def row_bytes(self, heads: HeadRange) -> int:
        """K and V of a token in one layer, in 16 bits."""
        return 2 * heads.count * self.layout.head_dim * self.layout.row_dtype.itemsize

    def columns(self, heads: HeadRange) -> slice:
        """Bytes of a page row that hold these heads."""
        part, width = heads.within(self.heads), self.layout.head_bytes
        return slice(part.start * width, part.stop * width)

    def payload(self, header: BlockHeader, data: Buffer) -> Any:
        """A payload as an array: uint8 [layers, pages, bytes], or 16-bit rows as uint8.

        Raises:
            WireError: another size.
        """
        if header.kind is BlockKind.PAGES:
            width = header.num_heads * self.layout.head_bytes
            shape: tuple[int, ...] = (header.num_layers, header.num_pages, width)
        else:
            head_bytes = self.layout.head_dim * self.layout.row_dtype.itemsize
            shape = (header.num_layers, 2, header.num_rows, header.num_heads, head_bytes)
        if len(data) != math.prod(shape):
            raise WireError(
                f"block {header.seq}: expected {math.prod(shape)} bytes, got {len(data)}"
            )
        return np.frombuffer(data, dtype=np.uint8).reshape(shape)

    def rows(self, kind: BlockKind, layer: int) -> torch.Tensor:
        """Storage of 16-bit rows of a layer, [slots, 2, rows, heads, head_dim]."""
        cache = self.pool.layers[layer]
        return cache.open_rows if kind is BlockKind.OPEN_ROWS else cache.sink_rows

    def table(self, kind: BlockKind) -> Any:
        """Slots of those rows."""
        return self.pool.open_slots if kind is BlockKind.OPEN_ROWS else self.pool.sink_slots


class CpuPoolAccess(PoolAccess):
    """A pool in main memory, as arrays of bytes: NumPy copies whole rows, PyTorch elements."""

    def __init__(self, pool: QuantizedKVPool, heads: HeadRange) -> None:
        super().__init__(pool, heads)
        self._pages: list[Bytes] = [layer.pages.numpy() for layer in pool.layers]
        self._rows: dict[BlockKind, list[Bytes]] = {
            kind: [self.rows(kind, i).view(torch.uint8).numpy() for i in range(self.num_layers)]
            for kind in (BlockKind.OPEN_ROWS, BlockKind.SINK_ROWS)
        }

    def held_slots(self, pages: PageIds, fence: list[Any]) -> tuple[int, int]:
        """As the base."""
        first, last = (torch.tensor([int(page)]) for page in (pages[0], pages[-1]))
        return int(self.pool.sink_slots.held_slot(first)), int(self.pool.open_slots.held_slot(last))

    def new_buffer(self, nbytes: int) -> Bytes:
        """As the base."""
        return np.empty(nbytes, dtype=np.uint8)

    def view(self, block: Block, heads: HeadRange) -> Bytes | None:
        """As the base: pages that follow each other in one layer, with all heads."""
        if block.kind is not BlockKind.PAGES or block.num_layers != 1 or heads != self.heads:
            return None
        run = run_of(block.pages)
        return None if run is None else self._pages[block.first_layer][run].reshape(-1)

    def read(self, block: Block, heads: HeadRange, out: Bytes) -> None:
        """As the base."""
        layers = slice(block.first_layer, block.first_layer + block.num_layers)
        if block.kind is BlockKind.PAGES:
            columns = self.columns(heads)
            shape = (block.num_layers, block.num_pages, columns.stop - columns.start)
            for array, target in zip(self._pages[layers], out.reshape(shape), strict=True):
                if shape[2] == array.shape[1]:
                    np.take(array, block.pages, axis=0, out=target, mode="clip")
                else:  # `take` would copy the whole array to make these columns contiguous
                    target[:] = array[block.pages, columns]
            return
        part = heads.within(self.heads)
        slot = int(self.table(block.kind).slot_of[block.pages[0]])
        shape_of_rows = (block.num_layers, 2, block.num_rows, heads.count, -1)
        arrays = self._rows[block.kind][layers]
        for array, target in zip(arrays, out.reshape(shape_of_rows), strict=True):
            target[:] = array[slot, :, : block.num_rows, part]

    def write(self, header: BlockHeader, payload: Buffer, place: PageIds) -> None:
        """As the base."""
        source = self.payload(header, payload)
        heads = HeadRange(header.first_head, header.first_head + header.num_heads)
        layers = slice(header.first_layer, header.first_layer + header.num_layers)
        if header.kind is BlockKind.PAGES:
            columns = self.columns(heads)
            for array, values in zip(self._pages[layers], source, strict=True):
                array[place, columns] = values
            return
        part = heads.within(self.heads)
        for array, values in zip(self._rows[header.kind][layers], source, strict=True):
            array[place[0], :, : header.num_rows, part] = values


class GpuPoolAccess(PoolAccess):
    """A pool on a GPU: a stream of its own, page-locked memory, waits in the transfer thread only.

    Args:
        pool: The pool of this rank.
        heads: KV heads it holds.
        forward_stream: CUDA stream that the model runs on; None for the current one.
    """

    def __init__(self, pool: QuantizedKVPool, heads: HeadRange, forward_stream: Any) -> None:
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
                slot = int(self.table(block.kind).slot_of[int(block.pages[0])])
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
        columns = self._word_columns(heads)
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

    def _word_columns(self, heads: HeadRange) -> slice:
        columns = self.columns(heads)  # multiples of 16 bytes: docs/kv_layout.md
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
                self._scatter_pages(header.first_layer, words, self._word_columns(heads), place)
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
        pages = None if run else torch.from_numpy(place).to(self.pool.device, non_blocking=True)
        for layer, values in zip(self._words[first_layer:], words, strict=False):
            if pages is None:
                layer[run, columns] = values
            else:
                layer[:, columns].index_copy_(0, pages, values)
