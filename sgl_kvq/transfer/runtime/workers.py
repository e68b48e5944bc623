"""A worker pool that copies and hashes large blocks beside the transfer thread.

NumPy's copies and xxHash release Python's lock while they work on a large block (xxHash from
version 3.6 or 4 on, by package), so blocks are worked on in parallel. Small blocks are not: their
threads would wait for the lock more often than they gain.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from queue import SimpleQueue

MIN_POOLED_BYTES = 512 * 2**10
"""A message with a block of at least this size goes to the pool."""


class Job(ABC):
    """Worker-pool job for one block; `error` is the exception if it failed.

    The transfer thread makes it, one thread runs it, and the transfer thread reads its result once
    it is `done`.

    Args:
        nbytes: Size of the block.
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

    @abstractmethod
    def work(self) -> None:
        """The work itself, in any thread."""


class WorkerPool:
    """A few threads with a short queue; a caller that finds it full does the work itself.

    Args:
        count: Threads, 0 for none.
        on_done: Called in a worker after the jobs of a message.
    """

    def __init__(self, count: int, on_done: Callable[[], None]) -> None:
        self._count, self._on_done = count, on_done
        self._queue: SimpleQueue[Sequence[Job] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the threads."""
        for _ in range(self._count):
            thread = threading.Thread(target=self._run, name="kvq-transfer-worker", daemon=True)
            thread.start()
            self._threads.append(thread)

    def run(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs of a message if one is large and a worker is free soon; else run them."""
        large = any(job.nbytes >= MIN_POOLED_BYTES for job in jobs)
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
