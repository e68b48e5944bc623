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
from sgl_kvq.transfer.runtime.inbound import HELD_BUFFER_BYTES, InboundLimits
from sgl_kvq.transfer.runtime.workers import WorkerPool

MAX_QUEUED_MESSAGES = 4
"""Messages of a connection that wait for the transfer thread; others wait in the kernel."""
MAX_UNSENT_MESSAGES = 8192
"""Messages for a peer that does not read; their bytes are bounded by its window."""
CHECK_PEERS_S, CHECK_STRANGERS_S = 0.005, 0.001
"""Time between two looks at what came in, if all of it came from peers and otherwise."""


class Environment:
    """ZeroMQ, the monotonic clock and real threads; tests put simulated ones in their place.

    Each transfer thread has its own. Only `wake` may be called from other threads.

    Attributes:
        context: Owner of the sockets.
        inbound: What connections have sent; the transfer thread adds them.
    """

    def __init__(self) -> None:
        self.context = zmq.Context()
        self._poller = zmq.Poller()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake_lock, self._closed = threading.Lock(), False
        self._poller.register(self._wake, zmq.POLLIN)
        self.inbound = InboundLimits(self.now)
        self._check_due, self._next_check = False, 0.0
        self._poller.register(self.inbound.fileno(), zmq.POLLIN)

    now = staticmethod(time.monotonic)
    """Seconds; never goes back."""

    random_bytes = staticmethod(os.urandom)
    """So many unpredictable bytes."""

    def make_socket(self, kind: int) -> zmq.Socket[bytes]:
        """A socket without linger, with heartbeats, that drops a peer with oversized frames."""
        socket = self.context.socket(kind)
        socket.linger = 0
        socket.rcvhwm, socket.sndhwm = MAX_QUEUED_MESSAGES, MAX_UNSENT_MESSAGES
        if kind == zmq.ROUTER:  # which nobody sends blocks
            socket.maxmsgsize, socket.rcvbuf = MAX_MESSAGE_BYTES, HELD_BUFFER_BYTES
        else:
            socket.maxmsgsize = MAX_BLOCK_BYTES
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
        """Wait for a readable socket or a `wake`; the sockets that can be read.

        Connections that send too much are dropped here, after the messages among what they sent
        were taken.
        """
        timeout_s = self._check_inbound(timeout_s)
        ready = dict(self._poller.poll(int(timeout_s * 1000)))
        self._check_due = ready.pop(self.inbound.fileno(), None) is not None
        if ready.pop(self._wake, None):
            with suppress(BlockingIOError):
                os.eventfd_read(self._wake)
        return list(ready)

    def _check_inbound(self, timeout_s: float) -> float:
        """Check what came in, if something did and the last look is a while ago."""
        now, descriptor = self.now(), self.inbound.fileno()
        if self._check_due:
            only_peers = self.inbound.check()
            self._poller.unregister(descriptor)
            self._next_check = now + (CHECK_PEERS_S if only_peers else CHECK_STRANGERS_S)
        if descriptor not in self._poller:
            if now < self._next_check:
                return min(timeout_s, self._next_check - now)
            self._poller.register(descriptor, zmq.POLLIN)
        return timeout_s

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
                self.inbound.close()
        self.context.destroy(linger=0)
