"""Prefill and decode instances: ranks with transfer threads, and a scheduler that uses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sgl_kvq.memory_pool.page_io.span import HeadRange
from sgl_kvq.transfer.blocks import heads_of_rank
from sgl_kvq.transfer.options import TransferConfig
from sgl_kvq.transfer.runtime.event_loop import TransferThread
from sgl_kvq.transfer.runtime.rank import Rank
from tests.support.simulation.codec import Wrapped
from tests.support.simulation.environment import SimulatedEnvironment
from tests.support.simulation.network import Network, Path
from tests.support.simulation.pools import NUM_PAGES, OPEN_SLOTS, SimulatedPool
from tests.support.simulation.requests import FAILED, SideOfRoom
from tests.support.simulation.scenario import Scenario

POLL_S = (0.005, 0.05)
SLACK_S = 1.5
"""Two ticks of the transfer thread, its rounds, and the scheduler's polls."""


class Instance:
    """What both sides have in common.

    Args:
        network: Of all instances.
        scenario: What to run.
        name: For the trace.
        tp_size: Its ranks.
        on_over: Called with each request that is over.

    Attributes:
        by_number: Requests that are not over, by room.
        alive: Whether the process runs.
    """

    side = ""

    def __init__(
        self,
        network: Network,
        scenario: Scenario,
        name: str,
        tp_size: int,
        on_over: Callable[[SideOfRoom], None],
    ) -> None:
        self.network, self.world, self.scenario = network, network.world, scenario
        self.name, self.tp_size, self._on_over = name, tp_size, on_over
        self.by_number: dict[int, SideOfRoom] = {}
        self.alive = False
        self.threads: list[Any] = []
        self.environments: list[SimulatedEnvironment] = []
        self.pools: list[SimulatedPool] = []
        self.free: list[int] = []
        self.running = 0  # requests that hold pages

    def heads(self, rank: int) -> HeadRange:
        return heads_of_rank(self.scenario.num_heads, self.tp_size, rank)

    def start(self) -> None:
        """Start all ranks, with empty memory."""
        self.alive, self.by_number, self.running = True, {}, 0
        self.free = list(range(1, NUM_PAGES + 1))
        self.environments = [self._make_environment(rank) for rank in range(self.tp_size)]
        self.pools = [SimulatedPool(self.network, self.heads(i)) for i in range(self.tp_size)]
        self.network.pools += self.pools
        self.threads = []
        for rank in range(self.tp_size):
            fingerprint = {"format": "simulated"}
            instance = self.world.rng.getrandbits(64)
            ours = Rank(self._config(), self.pools[rank], fingerprint, instance)
            self.threads.append(self._make_thread(rank, ours))
            self.environments[rank].start(self.threads[rank])

    def _config(self) -> TransferConfig:
        scenario = self.scenario
        return TransferConfig(
            port=self.port(0) if self.side == "prefill" else 0,
            codec=self._codec_name(),
            deadline_s=scenario.deadline_s,
            window_bytes=scenario.window_bytes,
            block_bytes=scenario.block_bytes,
            workers=scenario.workers,
        )

    def _codec_name(self) -> str:
        wrapped = self.side == "prefill" and self.scenario.codec != "identity"
        return Wrapped.name if wrapped else "identity"

    def port(self, rank: int) -> int:
        return 10_000 + 100 * int(self.name[1:]) + rank

    def _make_environment(self, rank: int) -> SimulatedEnvironment:
        environment = SimulatedEnvironment(
            self.network,
            f"{self.name}.{rank}",
            self.world.between(2e-5, 2e-3),
            lambda: self.check_round(rank),
        )
        environment.pooled = self.world.rng.choice([0.0, 0.5])
        return environment

    def _make_thread(self, rank: int, ours: Rank) -> TransferThread:
        raise NotImplementedError

    def kill(self) -> None:
        """The process ends without a word; its requests are over."""
        self.alive = False
        self.world.trace(self.name, "is killed")
        for environment in self.environments:
            environment.kill()
        for request in list(self.by_number.values()):
            self._note_over(request, FAILED)

    def soon(self, action: Callable[[], None]) -> None:
        """Run in the scheduler's next turn, if this process lives then."""
        environments = self.environments

        def run() -> None:
            if self.alive and self.environments is environments:
                action()

        self.world.after(self.world.rng.uniform(*POLL_S), run)

    def changed(self, request: SideOfRoom) -> None:
        self.soon(lambda: None if request.over_at else self.poll(request))

    def poll(self, request: SideOfRoom) -> None:
        """Look at a request whose status changed."""
        raise NotImplementedError

    def conclude(self, request: SideOfRoom, result: str) -> None:
        """The scheduler forgets a request and frees its pages."""
        for rank, state in enumerate(request.states):
            state.forget()
            self._close(request, rank, f"the {self.side} instance dropped the request")
        self._give_pages(request)
        self._note_over(request, result)

    def abort(self, request: SideOfRoom) -> None:
        """The user left."""
        self.world.trace(self.name, f"aborts {request.plan.number}")
        for rank, state in enumerate(request.states):
            state.fail(f"aborted at the {self.side} instance")
            self._close(request, rank, f"aborted at the {self.side} instance")
        self.conclude(request, FAILED)

    def _close(self, request: SideOfRoom, rank: int, reason: str) -> None:
        raise NotImplementedError

    def _note_over(self, request: SideOfRoom, result: str) -> None:
        request.over_at, request.result = self.world.now, result
        if self.world.tracing:
            reasons = "; ".join(request.reasons)
            self.world.trace(self.name, f"{request.plan.number} is over: {result} {reasons}")
        if self.by_number.get(request.plan.number) is request:
            del self.by_number[request.plan.number]
        self._on_over(request)

    def _take_pages(self, request: SideOfRoom, count: int, is_first: bool) -> bool:
        """Allocate pages of a request on all ranks; False if there are not enough."""
        if len(self.free) < count or self.running >= OPEN_SLOTS:
            return False
        self.running += 1
        self.world.rng.shuffle(self.free)
        if self.world.chance(0.3):
            self.free.sort(reverse=True)  # pages that follow each other are sent as they lie
        request.pages = np.array([self.free.pop() for _ in range(count)], dtype=np.int64)
        for pool in self.pools:
            pool.take(request.pages, request.plan.num_tokens, is_first)
        request.begun_at = self.world.now
        return True

    def _give_pages(self, request: SideOfRoom) -> None:
        if request.begun_at is None:
            return
        self.running -= 1
        for pool in self.pools:
            pool.give(request.pages)
        self.free += request.pages.tolist()
        request.pages = request.pages[:0]

    def paths(self, request: SideOfRoom, rank: int) -> list[Path]:
        """Ways on which a rank must hear of a request."""
        raise NotImplementedError

    def check_empty(self, rank: int) -> str:
        """What a rank still holds when all is over; empty for nothing."""
        raise NotImplementedError

    def check_round(self, rank: int) -> None:
        """What must hold after each round of a rank's thread."""
