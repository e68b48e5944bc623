"""Takes few new connections while strangers come."""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Callable
from contextlib import suppress

BURST = 8
"""Connections that may be accepted at once."""
STRANGERS_A_S = 4.0
"""Connections a second that may come to nothing, in the long run."""
FLOOD = 32
"""What a stranger counts that had to be dropped: it may have cost 0.1 s of a core."""
MAX_DEBT = 120
"""Half a minute: new decode ranks wait no longer for strangers that are gone."""
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_DROP_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)  # BPF_RET | BPF_K: keep 0 bytes


class Door:
    """Has the kernel ignore connection attempts while too many came to nothing.

    An accepted connection costs one of `BURST` credits. It gets it back when its peer belongs to
    us; time gives back the others. Without credits a packet filter on the listening socket drops
    what arrives at it. Clients try again by themselves, and established connections do not notice.

    Args:
        descriptor: ZeroMQ's listening socket.
        now: The clock, in seconds.
    """

    def __init__(self, descriptor: int, now: Callable[[], float]) -> None:
        self._socket = socket.socket(fileno=socket.dup(descriptor))
        self._now, self._since = now, now()
        self._credits = float(BURST)
        self._open = True

    def enter(self) -> None:
        """A connection was accepted."""
        self._pay(1)

    def leave(self) -> None:
        """The peer of a connection belongs to us."""
        self._pay(-1)

    def flooded(self) -> None:
        """A connection was dropped."""
        self._pay(FLOOD)

    def tick(self) -> None:
        """Open again once there are credits."""
        self._pay(0)

    def _pay(self, count: int) -> None:
        now = self._now()
        self._credits += (now - self._since) * STRANGERS_A_S - count
        self._credits, self._since = max(-MAX_DEBT, min(self._credits, BURST)), now
        is_open = self._credits >= (1 if self._open else BURST / 2)
        if is_open is not self._open:
            self._open = is_open
            self._filter()

    def _filter(self) -> None:
        program = ctypes.create_string_buffer(_DROP_ALL, len(_DROP_ALL))
        value = struct.pack("HP", 1, ctypes.addressof(program))
        option = _SO_DETACH_FILTER if self._open else _SO_ATTACH_FILTER
        with suppress(OSError):  # a kernel without filters accepts everybody
            self._socket.setsockopt(socket.SOL_SOCKET, option, value)

    def close(self) -> None:
        """Give the duplicate of the listening socket back."""
        self._socket.close()
