"""A TCP proxy that damages what passes, in one direction: from the prefill to the decode rank."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress


class Proxy:
    """Forwards connections to `target_port` on this machine.

    Args:
        target_port: Where the prefill rank listens.
        bytes_per_s: Speed limit from prefill to decode; None for none.
    """

    def __init__(self, target_port: int, bytes_per_s: float | None = None) -> None:
        self.target_port = target_port
        self.bytes_per_s = bytes_per_s
        self.passed_bytes = 0
        self.connections = 0
        self.stalled = threading.Event()
        self.refusing = False
        self._damage: Callable[[bytes], bytes] | None = None
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._closing = False
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def damage_once(self, change: Callable[[bytes], bytes]) -> None:
        """Change the next piece of at least 4 KiB on its way to the decode rank."""
        self._damage = change

    def cut(self) -> None:
        """Break every connection."""
        with self._lock:
            broken, self._open = self._open, []
        for sock in broken:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def close(self) -> None:
        self._closing = True
        self._listener.close()
        self.stalled.clear()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.refusing:
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self.target_port), timeout=5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            self.connections += 1
            with self._lock:
                self._open += [client, server]
            for source, sink, down in ((client, server, False), (server, client, True)):
                thread = threading.Thread(target=self._pump, args=(source, sink, down), daemon=True)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, down: bool) -> None:
        with suppress(OSError):
            while data := source.recv(self._piece_bytes()):
                if down:
                    data = self._downstream(data)
                sink.sendall(data)
        for sock in (source, sink):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _piece_bytes(self) -> int:
        """What passes at once: 50 ms at the speed limit."""
        return min(65536, max(1, int(self.bytes_per_s / 20))) if self.bytes_per_s else 65536

    def _downstream(self, data: bytes) -> bytes:
        while self.stalled.is_set() and not self._closing:
            time.sleep(0.01)
        self.passed_bytes += len(data)
        if self.bytes_per_s:
            time.sleep(len(data) / self.bytes_per_s)
        if self._damage is not None and len(data) >= 4096:
            change, self._damage = self._damage, None
            return change(data)
        return data
