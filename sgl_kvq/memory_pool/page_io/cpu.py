"""Reads blocks from a pool and writes them to one; the pool in main memory."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sgl_kvq.errors import WireError
from sgl_kvq.memory_pool.store import PagedStore
from sgl_kvq.transfer.blocks import Block, HeadRange, PageIds, run_of
from sgl_kvq.transfer.protocol.header import BlockHeader, BlockKind, Buffer

Bytes = npt.NDArray[np.uint8]


class PoolAccess(ABC):
    """A pool as the transfer thread sees it.

    Args:
        pool: The pool of this rank.
        heads: KV heads it holds.

    Attributes:
        shareable: Whether several threads may read and write blocks at the same time.
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
            return layers * block.num_pages * heads.count * self.head_bytes(block)
        return layers * block.num_rows * self.row_bytes(heads)

    def row_bytes(self, heads: HeadRange) -> int:
        """K and V of a token in one layer, in 16 bits."""
        return 2 * heads.count * self.layout.head_dim * self.layout.row_dtype.itemsize

    def head_bytes(self, block: Block | BlockHeader) -> int:
        """Bytes of a head in a page, the same in all layers of a block.

        Raises:
            WireError: it is not the same.
        """
        first, end = block.first_layer, block.first_layer + block.num_layers
        sizes = self._head_bytes[first:end]
        if not sizes or sizes.count(sizes[0]) != len(sizes):
            raise WireError(
                f"block of layers {first} to {end}: expected pages of one size, got "
                f"{sorted(set(sizes))} bytes a head"
            )
        return sizes[0]

    def columns(self, heads: HeadRange, width: int) -> slice:
        """Bytes of a page row that hold these heads of `width` bytes each."""
        part = heads.within(self.heads)
        return slice(part.start * width, part.stop * width)

    def payload(self, header: BlockHeader, data: Buffer) -> Any:
        """A payload as an array: uint8 [layers, pages, bytes], or 16-bit rows as uint8.

        Raises:
            WireError: another size.
        """
        if header.kind is BlockKind.PAGES:
            width = header.num_heads * self.head_bytes(header)
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

    shareable = True

    def __init__(self, pool: PagedStore, heads: HeadRange) -> None:
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
            columns = self.columns(heads, self.head_bytes(block))
            shape = (block.num_layers, block.num_pages, columns.stop - columns.start)
            for array, target in zip(self._pages[layers], out.reshape(shape), strict=True):
                if shape[2] == array.shape[1]:
                    np.take(array, block.pages, axis=0, out=target, mode="clip")
                else:  # `take` would copy the whole array to make these columns contiguous
                    target[:] = array[block.pages, columns]
            return
        part = heads.within(self.heads)
        slot = int(self.table(block.kind).held_slot(torch.from_numpy(block.pages[:1])))
        shape_of_rows = (block.num_layers, 2, block.num_rows, heads.count, -1)
        arrays = self._rows[block.kind][layers]
        for array, target in zip(arrays, out.reshape(shape_of_rows), strict=True):
            target[:] = array[slot, :, : block.num_rows, part]

    def write(self, header: BlockHeader, payload: Buffer, place: PageIds) -> None:
        """As the base."""
        if header.kind is BlockKind.PAGES:
            self._write_pages(header, payload, place)
            return
        source = self.payload(header, payload)
        layers = slice(header.first_layer, header.first_layer + header.num_layers)
        part = HeadRange(header.first_head, header.first_head + header.num_heads).within(self.heads)
        for array, values in zip(self._rows[header.kind][layers], source, strict=True):
            array[place[0], :, : header.num_rows, part] = values

    def _write_pages(self, header: BlockHeader, payload: Buffer, place: PageIds) -> None:
        run = run_of(place)
        if run is not None and header.num_layers == 1 and header.num_heads == self.heads.count:
            piece = self._pages[header.first_layer][run].reshape(-1)  # a small block's short way
            if len(piece) == len(payload):
                piece[:] = np.frombuffer(payload, dtype=np.uint8)
                return
        source = self.payload(header, payload)
        layers = slice(header.first_layer, header.first_layer + header.num_layers)
        heads = HeadRange(header.first_head, header.first_head + header.num_heads)
        columns = self.columns(heads, self.head_bytes(header))
        for array, values in zip(self._pages[layers], source, strict=True):
            array[run or place, columns] = values
