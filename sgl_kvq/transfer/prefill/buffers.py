"""Buffers that blocks are read into, reused once the other side has acknowledged the block."""

from __future__ import annotations

from collections.abc import Callable

from sgl_kvq.memory_pool.page_io.span import Bytes

SMALLEST_BYTES = 65536


class SendBuffers:
    """A free list of buffers by size: reused memory stays mapped and in the cache.

    A buffer comes back only when ZeroMQ has let go of it: it was never sent, or its block was sent
    once and the other side has it. Any other is left to ZeroMQ and to Python's garbage collector:
    it may be on its way still. (ZeroMQ's own trackers would say when it has left, for 20 us a
    block.)

    Args:
        make: Makes a buffer of so many bytes.
    """

    def __init__(self, make: Callable[[int], Bytes]) -> None:
        self._make = make
        self._free: dict[int, list[Bytes]] = {}

    def take(self, nbytes: int) -> Bytes:
        """A buffer of `nbytes` rounded up to a power of two."""
        size = max(SMALLEST_BYTES, 1 << (nbytes - 1).bit_length())
        free = self._free.get(size)
        return free.pop() if free else self._make(size)

    def give(self, buffer: Bytes) -> None:
        """Take a buffer back."""
        self._free.setdefault(len(buffer), []).append(buffer)
