"""What a simulated transfer thread runs on: virtual time, simulated sockets, workers as events."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import TypeVar

import zmq

from sgl_kvq.transfer.runtime.event_loop import TransferThread
from sgl_kvq.transfer.runtime.workers import Job
from tests.support.simulation.inbound import NoLimits
from tests.support.simulation.network import Network
from tests.support.simulation.sockets import Dealer, Router, Socket

_S = TypeVar("_S", bound=Socket)
_KINDS: dict[int, type[Socket]] = {int(zmq.DEALER): Dealer, int(zmq.ROUTER): Router}


class SimulatedEnvironment:
    """In the place of `Environment`; runs the rounds of one transfer thread as events.

    Args:
        network: Of all ranks.
        name: Of the rank.
        round_s: Time from one round to the next while there is something to do.
        after_round: Called after each round.

    Attributes:
        paused_until: No round begins before that: the process is stopped, or another thread has
            Python's lock.
        out_of_descriptors: Whether no socket can be made.
        pooled: Share of messages whose jobs are run by workers.
    """

    def __init__(
        self, network: Network, name: str, round_s: float, after_round: Callable[[], None]
    ) -> None:
        self.network, self.name = network, name
        self._world, self._round_s, self._after_round = network.world, round_s, after_round
        self._watched: list[Socket] = []
        self._sockets: list[Socket] = []
        self._due: float | None = None
        self._sleep_until = 0.0
        self._woken = False
        self.closed = False
        self.paused_until = 0.0
        self.out_of_descriptors = False
        self.pooled = 0.0
        self.inbound = NoLimits()
        self.thread: TransferThread

    def start(self, thread: TransferThread) -> None:
        self.thread = thread
        self._schedule(self._world.now)

    # What the transfer thread calls.

    def now(self) -> float:
        return self._world.now

    def random_bytes(self, count: int) -> bytes:
        return self._world.rng.randbytes(count)

    def make_socket(self, kind: int) -> Socket:
        if self.out_of_descriptors:
            raise zmq.ZMQError(errno.EMFILE)
        return self.open_socket(_KINDS[int(kind)](self))

    def open_socket(self, socket: _S) -> _S:
        self._sockets.append(socket)
        return socket

    def watch(self, socket: Socket) -> None:
        self._watched.append(socket)

    def unwatch(self, socket: Socket) -> None:
        self._watched.remove(socket)

    def wait(self, timeout_s: float) -> list[Socket]:
        self._sleep_until, self._woken = self._world.now + timeout_s, False
        ready = [socket for socket in self._watched if socket.readable]
        if len(ready) > 1:
            self._world.rng.shuffle(ready)
        return ready

    def wake(self) -> None:
        self._woken = True
        self._soon()

    def make_workers(self, count: int, on_done: Callable[[], None]) -> SimulatedWorkers:
        return SimulatedWorkers(self, count, on_done)

    def close(self) -> None:
        self.closed = True

    # What the simulation calls.

    @property
    def open_sockets(self) -> int:
        self._sockets = [socket for socket in self._sockets if not socket.closed]
        return len(self._sockets)

    def on_readable(self, socket: Socket) -> None:
        if socket in self._watched:
            self._soon()

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Run something in this process later, if it lives."""
        self._world.after(delay_s, lambda: None if self.closed else action())

    def kill(self) -> None:
        """The process is gone, with its sockets."""
        self.closed = True
        for socket in self._sockets:
            if not socket.closed and isinstance(socket, Dealer | Router):
                socket.kill()

    def _soon(self) -> None:
        if self._due is None or self._due > self._world.now + self._round_s:
            self._schedule(self._world.now + self._round_s)

    def _schedule(self, when: float) -> None:
        self._due = max(when, self.paused_until)
        self._world.at(self._due, self._round)

    def _round(self) -> None:
        world = self._world
        if self.closed or self._due is None or world.now < self._due:
            return  # replaced by another event
        if world.now < self.paused_until:
            self._schedule(self.paused_until)
            return
        self._due = None
        self.thread.step()
        self._after_round()
        if self.closed:
            return
        busy = self._woken or any(socket.readable for socket in self._watched)
        self._schedule(world.now + self._round_s if busy else max(self._sleep_until, world.now))


class SimulatedWorkers:
    """In the place of `WorkerPool`: jobs of some messages run later, in any order of messages."""

    def __init__(
        self, environment: SimulatedEnvironment, count: int, on_done: Callable[[], None]
    ) -> None:
        self._environment, self._count, self._on_done = environment, count, on_done
        self._queued: list[Sequence[Job]] = []

    def start(self) -> None:
        pass

    def run(self, jobs: Sequence[Job]) -> None:
        world = self._environment.network.world
        if not (self._count and jobs and world.chance(self._environment.pooled)):
            for job in jobs:
                job.run()
            return
        self._queued.append(jobs)
        self._environment.after(world.between(1e-4, 0.2), lambda: self._work(jobs))

    def _work(self, jobs: Sequence[Job]) -> None:
        if jobs in self._queued:
            self._queued.remove(jobs)
            for job in jobs:
                job.run()
            self._on_done()

    def stop(self) -> None:
        while self._queued:
            self._work(self._queued[0])
