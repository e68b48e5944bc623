"""What strangers do to a rank: bytes on plain TCP connections, as ZeroMQ's protocol has them."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)


def ready(kind: bytes) -> bytes:
    """The command that ends ZeroMQ's handshake without keys."""
    body = b"\x05READY\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind
    return bytes([4, len(body)]) + body


def frame(data: bytes, more: bool) -> bytes:
    if len(data) < 256:
        return bytes([more, len(data)]) + data
    return struct.pack(">BQ", 2 | more, len(data)) + data


def connect(port: int, timeout_s: float = 0.3) -> socket.socket:
    """A connection that has passed ZeroMQ's handshake."""
    sock = socket.create_connection(("127.0.0.1", port), timeout_s)
    shake_hands(sock, b"DEALER")
    return sock


def shake_hands(sock: socket.socket, kind: bytes) -> None:
    """ZeroMQ takes no message before the handshake is over."""
    sock.sendall(GREETING + ready(kind))
    answer = b""
    while b"READY" not in answer:
        answer += sock.recv(256)


def pour(sock: socket.socket, piece: bytes, until: float) -> int:
    """Send a piece over and over; how many bytes were taken until then or the end."""
    data = piece * max(1, 2**18 // len(piece))
    sent = 0
    with suppress(OSError):
        while time.monotonic() < until:
            sent += sock.send(data)
    return sent


def unfinished(size: int) -> Callable[[int, float], int]:
    """One message without an end, of frames of this size."""

    def attack(port: int, until: float) -> int:
        with suppress(OSError), connect(port) as sock:
            return pour(sock, frame(bytes(size), True), until)
        return 0

    return attack


def messages(size: int) -> Callable[[int, float], int]:
    """Whole messages of this size, without a Hello before them."""

    def attack(port: int, until: float) -> int:
        with suppress(OSError), connect(port) as sock:
            return pour(sock, frame(b"C", True) + frame(bytes(size), False), until)
        return 0

    return attack


def single_bytes(port: int, until: float) -> int:
    """Many connections, each with a message without an end, a byte a packet."""
    sockets, sent = [], 0
    with suppress(OSError):
        while len(sockets) < 10:
            sockets.append(connect(port, 0.02))
            sockets[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for sock in sockets:
        with suppress(OSError):
            while time.monotonic() < until:
                sent += sock.send(b"\1")
    return sent


def half_open(port: int, until: float) -> int:
    """Thousands of connections that say nothing."""
    sockets = list(_many(port, 4000, until))
    for sock in sockets:
        sock.close()
    return len(sockets)


def many_connections(port: int, until: float) -> int:
    """Thousands of connections that pass ZeroMQ's handshake and send a little."""
    sockets = []
    with suppress(OSError):
        for sock in _many(port, 4000, until):
            sockets.append(sock)
            sock.send(GREETING + ready(b"DEALER") + frame(b"", True) * 4000)
    for sock in sockets:
        sock.close()
    return len(sockets)


def _many(port: int, count: int, until: float) -> Iterator[socket.socket]:
    for _ in range(count):
        if time.monotonic() > until:
            return
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", port))
        yield sock


def pour_at_client(listener: socket.socket, size: int) -> int:
    """Answer a client with a message without an end, of frames of this size, until it hangs up."""
    sock, _ = listener.accept()
    with sock:
        sock.settimeout(10.0)
        shake_hands(sock, b"ROUTER")
        return pour(sock, frame(bytes(size), True), time.monotonic() + 10.0)
