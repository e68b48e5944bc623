"""What a transfer thread takes from its machine: time, random numbers, sockets, threads."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import zmq

from sgl_kvq.transfer.protocol.header import MAX_BLOCK_BYTES
from sgl_kvq.transfer.protocol.messages import MAX_MESSAGE_BYTES
from sgl_kvq.transfer.runtime.workers import WorkerPool


class Environment:
    """ZeroMQ, the monotonic clock and real threads; tests put simulated ones in their place.

    Each transfer thread has its own. Only `wake` may be called from other threads.

    Attributes:
        context: Owner of the sockets.
    """

    def __init__(self) -> None:
        self.context = zmq.Context()
        self._poller = zmq.Poller()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake_lock, self._closed = threading.Lock(), False
        self._poller.register(self._wake, zmq.POLLIN)

    now = staticmethod(time.monotonic)
    """Seconds; never goes back."""

    random_bytes = staticmethod(os.urandom)
    """So many unpredictable bytes."""

    def make_socket(self, kind: int) -> zmq.Socket[bytes]:
        """A socket without linger, with heartbeats, that drops a peer with oversized frames."""
        socket = self.context.socket(kind)
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = 0  # the window bounds what is on the way
        socket.maxmsgsize = max(MAX_BLOCK_BYTES, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15000)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        return socket

    def watch(self, socket: zmq.Socket[bytes]) -> None:
        """Have `wait` return this socket when it can be read."""
        self._poller.register(socket, zmq.POLLIN)

    def unwatch(self, socket: zmq.Socket[bytes]) -> None:
        """Undo `watch`."""
        self._poller.unregister(socket)

    def wait(self, timeout_s: float) -> list[zmq.Socket[bytes]]:
        """Wait for a readable socket or a `wake`; the sockets that can be read."""
        ready = dict(self._poller.poll(int(timeout_s * 1000)))
        if ready.pop(self._wake, None):
            with suppress(BlockingIOError):
                os.eventfd_read(self._wake)
        return list(ready)

    def wake(self) -> None:
        """End the `wait` that runs, or the next one."""
        with self._wake_lock:
            if not self._closed:  # the descriptor may be another's after that
                os.eventfd_write(self._wake, 1)

    def make_workers(self, count: int, on_done: Callable[[], None]) -> WorkerPool:
        """A pool of worker threads."""
        return WorkerPool(count, on_done)

    def close(self) -> None:
        """Close what is open; `wake` does nothing from now on."""
        with self._wake_lock:
            if not self._closed:
                self._closed = True
                os.close(self._wake)
        self.context.destroy(linger=0)
