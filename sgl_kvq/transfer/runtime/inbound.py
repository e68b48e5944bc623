"""How much a connection may send before a whole message of it was taken.

ZeroMQ bounds the size of a frame and, by its high-water mark, the number of whole messages. It
keeps the frames of an unfinished message without a limit, so the limit is kept here: the kernel
tells how many bytes came in, and a connection that sent too many is shut down. So is a stranger
that sent them in too many packets, each of which wakes ZeroMQ.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import termios
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

_DISCARD = socket.MSG_TRUNC | socket.MSG_DONTWAIT
_SO_BUF_LOCK = 72
# tcpi_bytes_received and tcpi_data_segs_in of struct tcp_info
_RECEIVED = struct.Struct("128xQ16xI4x")

HELD_BUFFER_BYTES = 1024
"""The kernel's receive buffer while a peer has said nothing that makes sense."""
FREE_PACKETS, PACKET_BYTES = 256, 256
"""Packets that a stranger may send, and one more for so many bytes that it may."""


class _Received(NamedTuple):
    """What has come in on a connection, unless the kernel still has it.

    Args:
        nbytes: Bytes that ZeroMQ has read from the kernel.
        packets: Packets with data, unread ones included.
    """

    nbytes: int
    packets: int


_NOTHING = _Received(0, 0)


@dataclass(eq=False)
class _Connection:
    """What is known about a connection.

    Args:
        duplicate: Of ZeroMQ's descriptor; stays the same connection when the number is reused.
        inode: Of both, while ZeroMQ has it open.
        limit_bytes: Bytes it may send between two messages that are taken.
        expires: When it is dropped if it is not `proven` by then, in seconds.
        on_drop: Called when it is dropped.
        taken: What had come in when the last message was taken.
        proven: Whether the peer has shown that it belongs to us.
    """

    duplicate: socket.socket
    inode: int
    limit_bytes: int
    expires: float
    on_drop: Callable[[], None]
    taken: _Received = _NOTHING
    proven: bool = False

    def received(self) -> _Received:
        """What has come in since the connection was opened."""
        info = self.duplicate.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED.size)
        unread = fcntl.ioctl(self.duplicate, termios.FIONREAD, bytes(4))
        nbytes, packets = _RECEIVED.unpack(info)
        return _Received(nbytes - int.from_bytes(unread, "little"), packets)

    def sent_too_much(self) -> bool:
        """Whether more than the limit has come in since the last message was taken."""
        now = self.received()
        packets = now.packets - self.taken.packets
        too_many = not self.proven and packets > FREE_PACKETS + self.limit_bytes // PACKET_BYTES
        return too_many or now.nbytes - self.taken.nbytes > self.limit_bytes


class InboundLimits:
    """The connections of a transfer thread, by ZeroMQ's descriptor.

    Args:
        now: The clock, in seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._connections: dict[int, _Connection] = {}
        self._epoll = select.epoll()

    def fileno(self) -> int:
        """Descriptor that can be read when bytes have come in: time to `check`."""
        return self._epoll.fileno()

    def __contains__(self, descriptor: int) -> bool:
        """Whether a connection was added and is open."""
        return descriptor in self._connections

    def add(
        self,
        descriptor: int,
        port: int,
        limit_bytes: int,
        expires: float = float("inf"),
        on_drop: Callable[[], None] = lambda: None,
    ) -> None:
        """Keep an eye on a connection that ZeroMQ has opened or accepted.

        Args:
            descriptor: ZeroMQ's.
            port: Its own or its peer's; a descriptor with another is not the connection any more.
            limit_bytes: Bytes it may send between two messages that are taken.
            expires: When it is dropped if it is not proven by then, in seconds.
            on_drop: Called when it is dropped.
        """
        self.forget(descriptor)
        with suppress(OSError):  # closed already
            duplicate = socket.socket(fileno=os.dup(descriptor))
            if port not in (duplicate.getsockname()[1], duplicate.getpeername()[1]):
                duplicate.close()
                return
            inode = os.fstat(duplicate.fileno()).st_ino
            known = _Connection(duplicate, inode, limit_bytes, expires, on_drop)
            self._connections[descriptor] = known
            self._epoll.register(duplicate, select.EPOLLIN | select.EPOLLET)

    def took(self, descriptor: int) -> None:
        """A whole message of the connection was taken."""
        known = self._connections.get(descriptor)
        if known is not None:
            known.taken = known.received()

    def prove(self, descriptor: int, limit_bytes: int, buffer_bytes: int = 0) -> bool:
        """The peer belongs to us and gets another limit.

        Args:
            descriptor: ZeroMQ's.
            limit_bytes: The new limit.
            buffer_bytes: New size of the kernel's receive buffer, 0 for the one it has.

        Returns:
            False if that was known, or the connection is gone.
        """
        known = self._connections.get(descriptor)
        if known is None or known.proven:
            return False
        known.proven, known.limit_bytes, known.taken = True, limit_bytes, known.received()
        if buffer_bytes:
            known.duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
            known.duplicate.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, buffer_bytes)
        return True

    def hold(self, descriptor: int) -> None:
        """Have the kernel take little at a time, where it can be undone (Linux 5.14)."""
        known = self._connections.get(descriptor)
        if known is not None:
            with suppress(OSError):
                known.duplicate.getsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK)
                known.duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, HELD_BUFFER_BYTES)

    def release(self, descriptor: int, limit_bytes: int) -> None:
        """Undo `hold`, with another limit: the kernel chooses the size of its buffer again."""
        known = self._connections.get(descriptor)
        if known is not None:
            known.limit_bytes = limit_bytes
            with suppress(OSError):
                known.duplicate.getsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK)
                known.duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**17)
                known.duplicate.setsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK, 0)
                known.duplicate.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, 2**30)

    def drop(self, descriptor: int) -> None:
        """End a connection."""
        known = self._connections.get(descriptor)
        if known is not None:
            with suppress(OSError):
                known.duplicate.shutdown(socket.SHUT_RDWR)
                known.duplicate.recv(2**20, _DISCARD)  # ZeroMQ would read what has come in
            self.forget(descriptor)
            known.on_drop()

    def check(self) -> bool:
        """Drop connections that sent too much; whether all that sent something are proven."""
        active = {number for number, _ in self._epoll.poll(0)}
        senders = [
            (descriptor, known)
            for descriptor, known in self._connections.items()
            if known.duplicate.fileno() in active
        ]
        for descriptor, known in senders:
            if known.sent_too_much():
                self.drop(descriptor)
        return all(known.proven for _, known in senders)

    def sweep(self) -> None:
        """Drop connections that are not proven in time; forget those that ZeroMQ has closed."""
        now = self._now()
        for descriptor, known in list(self._connections.items()):
            try:
                is_open = os.fstat(descriptor).st_ino == known.inode
            except OSError:
                is_open = False
            if not is_open:
                self.forget(descriptor)
            elif not known.proven and now > known.expires:
                self.drop(descriptor)

    def forget(self, descriptor: int) -> None:
        """Let a connection be, if it is known; ZeroMQ closes it."""
        known = self._connections.pop(descriptor, None)
        if known is not None:
            self._epoll.unregister(known.duplicate)
            known.duplicate.close()

    def close(self) -> None:
        """Forget all connections."""
        for descriptor in list(self._connections):
            self.forget(descriptor)
        self._epoll.close()
