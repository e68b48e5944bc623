"""The thread that owns a rank's sockets: commands, messages, timers."""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import zmq

from sgl_kvq.errors import KvqError
from sgl_kvq.memory_pool.page_io.base import PoolAccess
from sgl_kvq.transfer.options import TransferConfig
from sgl_kvq.transfer.protocol.handshake import digest
from sgl_kvq.transfer.protocol.header import MAX_BLOCK_BYTES, MAX_BLOCKS
from sgl_kvq.transfer.protocol.messages import MAX_MESSAGE_BYTES, Fingerprint
from sgl_kvq.transfer.runtime.metrics import TransferMetrics
from sgl_kvq.transfer.runtime.workers import WorkerPool

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

TICK_S = 0.25
ALIVE_S = 1.0
MESSAGES_A_ROUND = 8
MAX_FRAMES = MAX_BLOCKS + 2
CONTROL, BLOCK = b"C", b"B"
_NOBLOCK = int(zmq.NOBLOCK)  # pyzmq's flags are an enum, whose operators are slow


class TransferThread(threading.Thread):
    """Runs posted commands, received messages and a tick; nothing else touches the sockets.

    Args:
        side: "prefill" or "decode".
        config: The options.
        access: The pool of this rank.
        fingerprint: Values that the other side must have as well.
        instance: Drawn by this process, uint64.
    """

    def __init__(
        self,
        side: str,
        config: TransferConfig,
        access: PoolAccess,
        fingerprint: Fingerprint,
        instance: int,
    ) -> None:
        super().__init__(name=f"kvq-transfer-{side}", daemon=True)
        self.config, self.access, self.instance = config, access, instance
        self.fingerprint, self.digest = fingerprint, digest(fingerprint)
        self.metrics = TransferMetrics(side)
        self.context = zmq.Context()
        self.poller = zmq.Poller()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake_lock, self._ended = threading.Lock(), False
        self.poller.register(self._wake, zmq.POLLIN)
        self._commands: deque[Callable[[], None]] = deque()
        self._stopping = threading.Event()
        self._results_posted = False
        num_workers = config.workers if access.shareable else 0
        self.workers = WorkerPool(num_workers, self._on_job_done)

    def post(self, command: Callable[[], None]) -> None:
        """Run a command in this thread soon; may be called from any thread."""
        self._commands.append(command)
        with self._wake_lock:
            if not self._ended:  # the descriptor may be another's after that
                os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """End the thread and close its sockets; waits for both."""
        self._stopping.set()
        self.post(lambda: None)
        if self.is_alive():
            self.join(timeout=5)

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

    def run(self) -> None:
        """Loop until `stop`."""
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        self.workers.start()
        next_tick = next_alive = time.monotonic()
        try:
            while not self._stopping.is_set():
                busy = self._guard(self.work)
                wait_s = 0.0 if busy else max(0.0, next_tick - time.monotonic())
                ready = dict(self.poller.poll(int(wait_s * 1000)))
                if ready.pop(self._wake, None):
                    with suppress(BlockingIOError):
                        os.eventfd_read(self._wake)
                while self._commands:
                    self._guard(self._commands.popleft())
                for socket in ready:
                    self._guard(lambda socket=socket: self.receive(socket))  # type: ignore[misc]
                now = time.monotonic()
                if now >= next_tick:
                    self._guard(self.tick)
                    self.metrics.flush()
                    next_tick = now + TICK_S
                if now >= next_alive:
                    self._guard(self.send_alive)
                    next_alive = now + ALIVE_S
        finally:
            self._guard(self.close)
            self.workers.stop()
            with self._wake_lock:
                self._ended = True
                os.close(self._wake)
            self.context.destroy(linger=0)

    def _guard(self, step: Callable[[], _T]) -> _T | None:
        """Log the exception of a step: it must not end all transfers."""
        try:
            return step()
        except Exception:
            logger.exception("kvq-zmq: a step of the transfer thread failed")
            return None

    def _on_job_done(self) -> None:
        """In a worker: post one `take_results` for all jobs that are done when it runs."""
        if not self._results_posted:
            self._results_posted = True
            self.post(self._take_results)

    def _take_results(self) -> None:
        self._results_posted = False
        self.take_results()

    def take_results(self) -> None:
        """Continue with blocks whose jobs the workers have done."""
        raise NotImplementedError

    def receive(self, socket: zmq.Socket[bytes]) -> None:
        """Take a bounded number of messages from a readable socket; bad ones are dropped."""
        with suppress(zmq.Again):
            for _ in range(MESSAGES_A_ROUND):
                frames = _receive_frames(socket)
                try:
                    self.on_frames(socket, frames)
                except KvqError as error:
                    self.count_refused(error)

    def count_refused(self, error: KvqError) -> None:
        """Count a message or block that was refused."""
        self.metrics.refused.inc()
        logger.debug("kvq-zmq: message dropped: %s", error)

    def on_frames(self, socket: zmq.Socket[bytes], frames: list[zmq.Frame]) -> None:
        """Handle one message.

        Raises:
            KvqError: the message is invalid; nothing was changed.
        """
        raise NotImplementedError

    def work(self) -> bool:
        """Do a bounded piece of queued work; True if more is left."""
        return False

    def tick(self) -> None:
        """Check deadlines; every `TICK_S`."""
        raise NotImplementedError

    def send_alive(self) -> None:
        """Send a keep-alive with the rooms that this side works on; every `ALIVE_S`."""
        raise NotImplementedError

    def close(self) -> None:
        """Fail what is open and close the sockets."""
        raise NotImplementedError


def _receive_frames(socket: zmq.Socket[bytes]) -> list[zmq.Frame]:
    """Receive a message without a copy; of one with too many frames, one more than the limit.

    Raises:
        zmq.Again: there is none.
    """
    frames = [socket.recv(_NOBLOCK, copy=False)]
    while frames[-1].more:
        frame = socket.recv(copy=False)
        if len(frames) > MAX_FRAMES:
            frames.pop()
        frames.append(frame)
    return frames
