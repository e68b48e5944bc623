"""The thread that owns a rank's sockets: commands, messages, timers."""

from __future__ import annotations

import logging
import threading
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import zmq

from sgl_kvq.errors import KvqError
from sgl_kvq.transfer.protocol.header import MAX_BLOCKS
from sgl_kvq.transfer.runtime.environment import Environment
from sgl_kvq.transfer.runtime.metrics import TransferMetrics
from sgl_kvq.transfer.runtime.rank import Rank

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
        rank: Options, pool, fingerprint and number of this process.
        environment: Time, sockets and threads; closed with the thread. None for the real ones.
    """

    def __init__(self, side: str, rank: Rank, environment: Environment | None) -> None:
        super().__init__(name=f"kvq-transfer-{side}", daemon=True)
        self.config, self.access, self.instance = rank.config, rank.access, rank.instance
        self.fingerprint, self.digest = rank.fingerprint, rank.digest
        self.metrics = TransferMetrics(side)
        self.environment = environment or Environment()
        self.now = self.environment.now
        self._commands: deque[Callable[[], None]] = deque()
        self._stopping = threading.Event()
        self._results_posted = False
        self._next_tick = self._next_alive = self.now()
        num_workers = self.config.workers if self.access.shareable else 0
        self.workers = self.environment.make_workers(num_workers, self._on_job_done)

    def post(self, command: Callable[[], None]) -> None:
        """Run a command in this thread soon; may be called from any thread."""
        self._commands.append(command)
        self.environment.wake()

    def stop(self) -> None:
        """End the thread and close its sockets; waits for both."""
        self._stopping.set()
        self.post(lambda: None)
        if self.is_alive():
            self.join(timeout=5)

    def run(self) -> None:
        """Loop until `stop`."""
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        self.workers.start()
        try:
            while not self._stopping.is_set():
                self.step()
        finally:
            self.end()

    def step(self) -> None:
        """One round: queued work, commands, messages, and what is due."""
        busy = self._guard(self.work)
        wait_s = 0.0 if busy else max(0.0, self._next_tick - self.now())
        ready = self.environment.wait(wait_s)
        while self._commands:
            self._guard(self._commands.popleft())
        for socket in ready:
            self._guard(lambda socket=socket: self.receive(socket))  # type: ignore[misc]
        now = self.now()
        if now >= self._next_tick:
            self._guard(self.tick)
            self.metrics.flush()
            self._next_tick = now + TICK_S
        if now >= self._next_alive:
            self._guard(self.send_alive)
            self._next_alive = now + ALIVE_S

    def end(self) -> None:
        """What follows the last round."""
        self._guard(self.close)
        self.workers.stop()
        self.environment.close()

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
