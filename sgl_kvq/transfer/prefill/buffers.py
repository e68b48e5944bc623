"""Buffers that blocks are read into, used again once the other side has acknowledged the block."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

SMALLEST_BYTES = 65536


class SendBuffers:
    """Memory that is written again stays mapped and in the cache; fresh memory is neither.

    At most as many buffers exist as blocks were under way at one time. ZeroMQ may hold the buffer
    of a block that was given up, until its connection goes: if another block is read into it then,
    the checksum of the first one does not hold any more, and nobody waits for it. (ZeroMQ's own
    trackers would say when a buffer has left, for 20 us a block.)

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
