"""A TCP relay with the speed of a slow link, as a process of its own.

It stands between the two ends of a connection, takes what one sends and hands it on at the link's
speed, both directions alike, all connections together. TCP itself sees two fast local connections:
unlike a shaped interface a relay shows no effect of the link on TCP's own control.
"""

from __future__ import annotations

import multiprocessing
import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

PIECE_BYTES = 256 * 1024
PIECES_WAITING = 8
START_S = 30.0


class _Direction:
    """One direction of the link: when the next byte may pass."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._lock = threading.Lock()

    def due(self, num_bytes: int) -> float:
        """Time at which a piece that is there now has passed."""
        with self._lock:
            self._free_at = max(time.monotonic(), self._free_at) + num_bytes / self._bytes_per_s
            return self._free_at


def _forward(source: socket.socket, sink: socket.socket, direction: _Direction) -> None:
    """Hand on what comes from `source` until it ends."""
    waiting: queue.Queue[tuple[float, bytes]] = queue.Queue(PIECES_WAITING)

    def send() -> None:
        with suppress(OSError):
            while (piece := waiting.get())[1]:
                time.sleep(max(0.0, piece[0] - time.monotonic()))
                sink.sendall(piece[1])
        for sock in (source, sink):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    with suppress(OSError):
        while data := source.recv(PIECE_BYTES):
            piece = (direction.due(len(data)), data)
            while sender.is_alive():
                with suppress(queue.Full):
                    waiting.put(piece, timeout=1.0)
                    break
    with suppress(queue.Full):
        waiting.put((0.0, b""), timeout=1.0)


def _serve(pipe: Any, target_port: int, bytes_per_s: float) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    pipe.send(listener.getsockname()[1])
    down, up = _Direction(bytes_per_s), _Direction(bytes_per_s)
    while True:
        client, _ = listener.accept()
        try:
            server = socket.create_connection(("127.0.0.1", target_port), timeout=5)
        except OSError:
            client.close()
            continue
        server.settimeout(None)
        for source, sink, direction in ((server, client, down), (client, server, up)):
            sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            arguments = (source, sink, direction)
            threading.Thread(target=_forward, args=arguments, daemon=True).start()


@contextmanager
def relay(target_port: int, gbit_s: float) -> Iterator[int]:
    """Run a relay to a port of this machine; yields the port that it listens on.

    Args:
        target_port: Where connections are made to, once somebody connects here.
        gbit_s: Speed of the link in each direction.
    """
    near, far = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_serve, args=(far, target_port, gbit_s * 1e9 / 8), daemon=True
    )
    process.start()
    try:
        if not near.poll(START_S):
            raise RuntimeError("the relay did not start")
        yield int(near.recv())
    finally:
        process.kill()
        process.join()


def measure_gbit_s(gbit_s: float, num_bytes: int) -> float:
    """Speed that a relay reaches when both ends are as fast as they can be."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        relay(int(listener.getsockname()[1]), gbit_s) as port,
        socket.create_connection(("127.0.0.1", port)) as client,
    ):
        server, _ = listener.accept()
        with server:
            data = bytes(num_bytes)
            threading.Thread(target=server.sendall, args=(data,), daemon=True).start()
            began, got = time.perf_counter(), 0
            buffer = bytearray(PIECE_BYTES)
            while got < num_bytes:
                got += client.recv_into(buffer)
            return got * 8e-9 / (time.perf_counter() - began)
