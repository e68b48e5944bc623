"""One request's transfer state, shared by the scheduler thread and the transfer thread."""

from __future__ import annotations

import threading
from collections.abc import Callable


class RequestState:
    """Whether one request's transfer is over; no transition and no write after that.

    Args:
        on_failure: Called with the reason, once, unless the transfer succeeded before.
    """

    def __init__(self, on_failure: Callable[[str], None]) -> None:
        self.lock = threading.Lock()
        self.over = False
        self._ending = False
        self._writers = 0
        self._drained = threading.Condition(self.lock)
        self._on_failure = on_failure

    def fail(self, reason: str) -> bool:
        """End the transfer with a reason; False if it was over already.

        Waits for running writes (on a GPU each ends with a stream synchronization); none runs or
        begins after this returns.
        """
        with self.lock:
            self._drain()
            if self.over:
                return False
            self.over = True
            self._on_failure(reason)
            return True

    def finish(self, on_success: Callable[[], None]) -> bool:
        """End the transfer with success, after its last write; False if it was over already."""
        with self.lock:
            if self.over:
                return False
            on_success()
            self.over = True
            return True

    def forget(self) -> None:
        """End the transfer without a callback; waits for running writes as `fail` does."""
        with self.lock:
            self._drain()
            self.over = True

    def _drain(self) -> None:
        self._ending = True
        while self._writers:
            self._drained.wait()

    def write(self, step: Callable[[], None]) -> None:
        """Run a write unless the transfer is over; several threads may write at the same time."""
        with self.lock:
            if self.over or self._ending:
                return
            self._writers += 1
        try:
            step()
        finally:
            with self.lock:
                self._writers -= 1
                if self._ending:
                    self._drained.notify_all()

    def advance(self, step: Callable[[], None]) -> None:
        """Run a step under the lock unless the transfer is over."""
        with self.lock:
            if not self.over:
                step()
