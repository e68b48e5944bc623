"""Blocks of a transfer: how pages are cut, read from one pool and written to another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sgl_kvq.config import PAGE_SIZE
from sgl_kvq.errors import WireError
from sgl_kvq.memory_pool.quantized_pool import QuantizedKVPool
from sgl_kvq.transfer.wire import BlockHeader, BlockKind, Buffer


@dataclass(frozen=True)
class HeadRange:
    """KV heads [first, end), counted over all ranks."""

    first: int
    end: int

    @property
    def count(self) -> int:
        """Number of heads."""
        return self.end - self.first

    def intersect(self, other: HeadRange) -> HeadRange:
        """Heads in both; count 0 if there are none."""
        first = max(self.first, other.first)
        return HeadRange(first, max(first, min(self.end, other.end)))

    def within(self, outer: HeadRange) -> slice:
        """These heads as a slice of those of a rank that holds `outer`."""
        return slice(self.first - outer.first, self.end - outer.first)


def heads_of_rank(num_kv_heads: int, tp_size: int, tp_rank: int) -> HeadRange:
    """KV heads that SGLang gives a rank; ranks share a head when there are more of them."""
    if tp_size >= num_kv_heads:
        head = tp_rank * num_kv_heads // tp_size
        return HeadRange(head, head + 1)
    count = num_kv_heads // tp_size
    return HeadRange(tp_rank * count, (tp_rank + 1) * count)


@dataclass(frozen=True, eq=False)
class Block:
    """A block to send, before it is read from the pool.

    Args:
        kind: What it holds.
        first_page: Position of its first page in the sequence.
        pages: int64 [num_pages] on the pool's device, where its pages lie in the pool.
        first_layer: First layer.
        num_layers: Layers.
        num_rows: Rows of 16-bit blocks.
        slot: int64 [1] on the pool's device, open or sink slot of 16-bit blocks.
        data: The payload itself, of METADATA.
        ready: CUDA event after which the pool holds the bytes; None on a CPU.
    """

    kind: BlockKind
    first_page: int = 0
    pages: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    first_layer: int = 0
    num_layers: int = 0
    num_rows: int = 0
    slot: torch.Tensor | None = None
    data: bytes = b""
    ready: Any = None


def cut_pages(
    first_page: int,
    pages: torch.Tensor,
    num_layers: int,
    page_bytes: int,
    block_bytes: int,
    ready: Any = None,
) -> Iterator[Block]:
    """Cut closed pages into blocks of about `block_bytes`.

    Whole pages (all layers) as long as one fits; else a page is cut by layers.

    Args:
        first_page: Position of the first page in the sequence.
        pages: int64 [n], pages in the pool.
        num_layers: Layers of the pool.
        page_bytes: Bytes of a page in one layer, of the heads that are sent.
        block_bytes: Size to fill up to.
        ready: See `Block`.
    """
    layers = max(1, min(num_layers, block_bytes // page_bytes))
    count = max(1, block_bytes // (page_bytes * num_layers))
    for start in range(0, len(pages), count):
        for first_layer in range(0, num_layers, layers):
            yield Block(
                BlockKind.PAGES,
                first_page + start,
                pages[start : start + count],
                first_layer,
                min(layers, num_layers - first_layer),
                ready=ready,
            )


class PoolAccess:
    """Reads blocks from a pool and writes them to one, outside the model's own stream.

    On a GPU copies run on a stream of their own through pinned memory; each call waits for its
    copy, in the transfer thread.

    Args:
        pool: The pool of this rank.
        heads: KV heads it holds.
    """

    def __init__(self, pool: QuantizedKVPool, heads: HeadRange) -> None:
        self.pool = pool
        self.heads = heads
        self.layout = pool.layout
        self.num_layers = pool.plan.num_layers
        self._stream: Any = None
        # On a CPU whole rows of bytes are copied by NumPy: PyTorch's indexing takes ten times as
        # long for uint8 (43 KiB: 55 against 5 us).
        self._arrays: list[npt.NDArray[np.uint8]] = []
        if str(pool.device).startswith("cpu"):
            self._arrays = [layer.pages.numpy() for layer in pool.layers]
        else:
            self._stream = torch.cuda.Stream(device=pool.device)

    def event(self) -> Any:
        """Mark the work queued so far on the caller's stream; None on a CPU."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def read(self, block: Block, heads: HeadRange) -> memoryview:
        """Copy a block out of the pool.

        Args:
            block: Which.
            heads: Which heads of it.

        Returns:
            The payload before the codec, in memory of its own.
        """
        if block.kind is BlockKind.METADATA:
            return memoryview(block.data)
        if self._arrays and block.kind is BlockKind.PAGES:
            return self._read_pages(block, self._columns(heads))
        if self._stream is None:
            return _bytes_of(self._gather(block, heads))
        with torch.cuda.stream(self._stream):
            if block.ready is not None:
                self._stream.wait_event(block.ready)
            source = self._gather(block, heads)
            staged = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            staged.copy_(source, non_blocking=True)
        self._stream.synchronize()
        return _bytes_of(staged)

    def _columns(self, heads: HeadRange) -> slice:
        """Bytes of a page row that hold these heads."""
        part, width = heads.within(self.heads), self.layout.head_bytes
        return slice(part.start * width, part.stop * width)

    def _read_pages(self, block: Block, columns: slice) -> memoryview:
        arrays = self._arrays[block.first_layer : block.first_layer + block.num_layers]
        pages = block.pages.numpy()
        out = np.empty((len(arrays), len(pages), columns.stop - columns.start), dtype=np.uint8)
        for array, target in zip(arrays, out, strict=True):
            np.take(array[:, columns], pages, axis=0, out=target, mode="clip")
        flat: Any = out.reshape(-1)
        return memoryview(flat)

    def _gather(self, block: Block, heads: HeadRange) -> torch.Tensor:
        """Contiguous payload on the pool's device."""
        part = heads.within(self.heads)
        layers = self.pool.layers[block.first_layer : block.first_layer + block.num_layers]
        if block.kind is BlockKind.PAGES:
            columns = self._columns(heads)
            shape = (len(layers), len(block.pages), columns.stop - columns.start)
            out = torch.empty(shape, dtype=torch.uint8, device=self.pool.device)
            for i, layer in enumerate(layers):
                torch.index_select(layer.pages[:, columns], 0, block.pages, out=out[i])
            return out
        assert block.slot is not None
        rows = [
            (layer.open_rows if block.kind is BlockKind.OPEN_ROWS else layer.sink_rows)[
                block.slot, :, : block.num_rows, part
            ]
            for layer in layers
        ]
        return torch.cat(rows).contiguous()

    def write(self, header: BlockHeader, payload: Buffer, place: torch.Tensor) -> None:
        """Copy a payload into the pool.

        Args:
            header: Says layers, heads and rows; ranges already checked.
            payload: Before the codec.
            place: int64 on the CPU: [num_pages] pages, or [1] slot.

        Raises:
            WireError: the payload does not have the size of its shape.
        """
        shape, dtype = self._payload_shape(header)
        size = math.prod(shape) * dtype.itemsize
        if len(payload) != size:
            raise WireError(f"block {header.seq}: expected {size} bytes, got {len(payload)}")
        columns = self._columns(HeadRange(header.first_head, header.first_head + header.num_heads))
        if self._arrays and header.kind is BlockKind.PAGES:
            values = np.frombuffer(payload, dtype=np.uint8).reshape(shape)
            pages = place.numpy()
            for layer, rows in enumerate(values, header.first_layer):
                self._arrays[layer][pages, columns] = rows
            return
        source = torch.frombuffer(payload, dtype=dtype).view(shape)
        if self._stream is None:
            self._scatter(header, source, place)
            return
        with torch.cuda.stream(self._stream):
            device = self.pool.device
            staged = source.pin_memory().to(device, non_blocking=True)
            self._scatter(header, staged, place.to(device))
        self._stream.synchronize()

    def _payload_shape(self, header: BlockHeader) -> tuple[tuple[int, ...], torch.dtype]:
        layers, heads = header.num_layers, header.num_heads
        if header.kind is BlockKind.PAGES:
            return (layers, header.num_pages, heads * self.layout.head_bytes), torch.uint8
        rows = (layers, 2, header.num_rows, heads, self.layout.head_dim)
        return rows, self.layout.row_dtype

    def _scatter(self, header: BlockHeader, source: torch.Tensor, place: torch.Tensor) -> None:
        first = header.first_head
        part = HeadRange(first, first + header.num_heads).within(self.heads)
        layers = self.pool.layers[header.first_layer : header.first_layer + header.num_layers]
        columns = self._columns(HeadRange(first, first + header.num_heads))
        for layer, values in zip(layers, source, strict=True):
            if header.kind is BlockKind.PAGES:
                layer.pages[place, columns] = values
            elif header.kind is BlockKind.OPEN_ROWS:
                layer.open_rows[place, :, : header.num_rows, part] = values
            else:
                layer.sink_rows[place, :, : header.num_rows, part] = values


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def rows_in_last_page(num_tokens: int) -> int:
    """Rows of the open page of a sequence, 0 when its last page is full."""
    return num_tokens % PAGE_SIZE
