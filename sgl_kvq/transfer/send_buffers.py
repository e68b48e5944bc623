"""Buffers that blocks are read into, used again once ZeroMQ has let go of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import zmq

Bytes = npt.NDArray[np.uint8]

SMALLEST_BYTES = 65536
LOOKS = 4


class SendBuffers:
    """Memory that is written again stays mapped and in the cache; fresh memory is neither.

    At most as many buffers exist as blocks were under way at one time.

    Args:
        make: Makes a buffer of so many bytes.
    """

    def __init__(self, make: Callable[[int], Bytes]) -> None:
        self._make = make
        self._lent: dict[int, deque[tuple[Bytes, zmq.MessageTracker]]] = {}

    def take(self, nbytes: int) -> Bytes:
        """A buffer that nobody reads, of `nbytes` rounded up to a power of two."""
        size = max(SMALLEST_BYTES, 1 << (nbytes - 1).bit_length())
        lent = self._lent.setdefault(size, deque())
        for _ in range(min(LOOKS, len(lent))):
            if lent[0][1].done:
                return lent.popleft()[0]
            lent.rotate(-1)  # of a peer that is slower than the others
        return self._make(size)

    def give(self, buffer: Bytes, tracker: zmq.MessageTracker) -> None:
        """Take a buffer back; it is lent again once its message has left."""
        self._lent.setdefault(len(buffer), deque()).append((buffer, tracker))
