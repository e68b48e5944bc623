"""Runs one seed and checks the promises of the transfer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import REGISTRY

from tests.support.simulation import codec
from tests.support.simulation.decode_instance import DecodeInstance
from tests.support.simulation.endings import Endings
from tests.support.simulation.faults import HALF_OPEN_S, Faults
from tests.support.simulation.network import Network, Path
from tests.support.simulation.pools import Content
from tests.support.simulation.prefill_instance import PrefillInstance
from tests.support.simulation.requests import SideOfRoom
from tests.support.simulation.scenario import RoomPlan, Scenario, draw
from tests.support.simulation.world import START_S, Violation, World

LOOK_S = 0.5
"""Between two looks at requests that should be over."""


def run_seed(seed: int) -> Scenario:
    """Run one seed.

    Raises:
        Violation: a promise was broken; with the scenario, the trace, and how to see it again.
    """
    scenario = draw(seed)
    try:
        Simulation(scenario).run()
    except Violation as violation:
        raise Violation(explain(scenario, str(violation))) from None
    return scenario


def explain(scenario: Scenario, violation: str, num_lines: int = 60) -> str:
    """The end of the trace of a seed that breaks a promise."""
    lines = [line for line in trace(scenario) if ": Alive" not in line]
    again = f"python -m tests.support.simulation --from {scenario.seed} --seeds 1 --trace"
    return "\n".join(
        [violation, str(scenario), *lines[-num_lines:], f"{len(lines)} lines in all: {again}"]
    )


def trace(scenario: Scenario) -> list[str]:
    """Run once more, noting what happens."""
    simulation = Simulation(scenario, tracing=True)
    try:
        simulation.run()
    except Violation as violation:
        simulation.world.trace("violation", str(violation))
    return simulation.world.lines


class Simulation:
    """All instances of a scenario, and the promises that they keep.

    Args:
        scenario: What happens.
        tracing: Whether to note it.
    """

    def __init__(self, scenario: Scenario, tracing: bool = False) -> None:
        self.scenario = scenario
        self.world = World(scenario.seed, tracing)
        self.network = Network(self.world, self._make_path)
        sizes = (scenario.prefill_tp, scenario.decode_tp)
        self.prefill, self.decode = (
            [
                kind(self.network, scenario, f"{kind.side[0]}{i}", tp_size, self._over)
                for i, tp_size in enumerate(tp_sizes)
            ]
            for kind, tp_sizes in zip((PrefillInstance, DecodeInstance), sizes, strict=True)
        )
        self.sides: dict[tuple[int, str], SideOfRoom] = {}
        self._open = 2 * len(scenario.rooms)

    def _make_path(self, rank: str, endpoint: str) -> Path:
        scenario, world = self.scenario, self.world
        return Path(
            rank,
            endpoint,
            world.between(*scenario.latency_s),
            world.between(*scenario.bytes_per_s),
            world.rng.choice([4096, 4096, 16_384, 2**18, 2**21]),
        )

    def _over(self, side: SideOfRoom) -> None:
        self._open -= 1

    def run(self) -> None:
        scenario, world = self.scenario, self.world
        with codec.registered(scenario.codec == "broken") as wrapped, self._errors():
            failures = checksum_failures()
            for prefill in self.prefill:
                prefill.start()
            wrapped.installed = self.network.can_undo = scenario.codec != "missing"
            for decode in self.decode:
                decode.prefill = self.prefill
                decode.start()
            wrapped.installed = True
            self._plan()
            endings = Endings(self)
            self._look(endings)
            over = world.run(lambda: self._open == 0, endings.limit_s)
            endings.check_all(over)
            late_s = 2 * HALF_OPEN_S if any(f.kind == "half_open" for f in scenario.faults) else 0
            rest_s = START_S + scenario.quiet_from - world.now  # a process may still stand still
            world.run(lambda: False, max(1.5 * scenario.deadline_s + late_s, rest_s) + 1)
            endings.check_nothing_held()
            endings.check_checksums(checksum_failures() - failures)
        for pool in self.network.pools:
            pool.release()

    def _plan(self) -> None:
        world, faults = self.world, Faults(self.network, self.prefill, self.decode)
        for plan in self.scenario.rooms:
            world.at(START_S + plan.prefill_at, lambda plan=plan: self._arrive(plan, "prefill"))
            world.at(START_S + plan.decode_at, lambda plan=plan: self._arrive(plan, "decode"))
            if plan.abort:
                world.at(START_S + plan.abort[1], lambda plan=plan: self._abort(plan))
        for fault in self.scenario.faults:
            world.at(START_S + fault.at, lambda fault=fault: faults.apply(fault))

    def _instance(self, plan: RoomPlan, side: str) -> Any:
        return self.prefill[plan.prefill] if side == "prefill" else self.decode[plan.decode]

    def _arrive(self, plan: RoomPlan, side: str) -> None:
        instance = self._instance(plan, side)
        content = Content.draw(plan.key, plan.num_tokens, self.scenario.num_heads)
        request = SideOfRoom(plan, side, instance.tp_size, content, self.world.now)
        self.sides[plan.key, side] = request
        if self.world.tracing:
            self.world.trace(instance.name, f"gets {plan}")
        instance.arrive(request)

    def _abort(self, plan: RoomPlan) -> None:
        assert plan.abort is not None
        side = plan.abort[0]
        request = self.sides.get((plan.key, side))
        if request is not None and request.over_at is None:
            self._instance(plan, side).abort(request)

    def _look(self, endings: Endings) -> None:
        endings.check_running()
        self.world.after(LOOK_S, lambda: self._look(endings))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What is logged as an error is one, a codec that cannot be undone excepted."""
        handler = logging.Handler(logging.ERROR)
        handler.emit = self._on_error  # type: ignore[method-assign]
        logger = logging.getLogger("sgl_kvq.transfer")
        propagate, logger.propagate = logger.propagate, False
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.propagate = propagate

    def _on_error(self, record: logging.LogRecord) -> None:
        if self.scenario.codec != "broken":
            error = record.exc_info[1] if record.exc_info else ""
            self.world.violate(f"logged: {record.getMessage()} ({error!r})")


def checksum_failures() -> float:
    """Of all decode ranks since this process began."""
    name = "sgl_kvq:transfer_checksum_failures_total"
    return REGISTRY.get_sample_value(name, {"side": "decode"}) or 0.0
