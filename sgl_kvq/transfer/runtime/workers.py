"""Threads that copy and hash large blocks beside the transfer thread, a message's at a time.

NumPy's copies and xxHash let other Python threads run while they work on a large block (xxHash from
version 3.6 or 4 on, by package), so blocks are worked on side by side. Small blocks are not: their
threads would wait for Python's lock more often than they gain.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue

HELPED_BYTES = 512 * 2**10
"""Blocks from this size on are worth handing over."""


def default_helpers() -> int:
    """Three on a machine with cores to spare: ZeroMQ's and the transfer thread need two."""
    return max(0, min(3, len(os.sched_getaffinity(0)) - 2))


class Job:
    """A piece of work on one block; `error` says why it came to nothing.

    The transfer thread makes it, one thread runs it, and the transfer thread looks at it again once
    it is `done`.

    Args:
        nbytes: Of the block.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.done = False
        self.error: Exception | None = None

    def run(self) -> None:
        """Do the work; never raises."""
        try:
            self.work()
        except Exception as error:
            self.error = error
        self.done = True

    def work(self) -> None:
        """The work itself, in any thread."""
        raise NotImplementedError


class Helpers:
    """A few threads with a short queue; whoever finds it full does the work itself.

    Args:
        count: Threads, 0 for none.
        on_done: Called in a helper after the jobs of a message.
    """

    def __init__(self, count: int, on_done: Callable[[], None]) -> None:
        self._count, self._on_done = count, on_done
        self._queue: SimpleQueue[Sequence[Job] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the threads."""
        for _ in range(self._count):
            thread = threading.Thread(target=self._run, name="kvq-transfer-helper", daemon=True)
            thread.start()
            self._threads.append(thread)

    def run(self, jobs: Sequence[Job]) -> None:
        """Run the jobs of a message here, or let a helper do it.

        A helper does it if there is a large block among them and a helper will have time soon.
        """
        large = any(job.nbytes >= HELPED_BYTES for job in jobs)
        if large and self._queue.qsize() < len(self._threads):
            self._queue.put(jobs)
            return
        for job in jobs:
            job.run()

    def stop(self) -> None:
        """Finish what is queued and end the threads."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _run(self) -> None:
        while (jobs := self._queue.get()) is not None:
            for job in jobs:
                job.run()
            self._on_done()
