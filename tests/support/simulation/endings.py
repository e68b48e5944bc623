"""How requests must end, and what may be left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sgl_kvq.transfer.prefill.pace import START_BYTES
from tests.support.simulation.instances import SLACK_S, Instance
from tests.support.simulation.requests import FAILED, SUCCESS, SideOfRoom
from tests.support.simulation.scenario import WRONG_SOURCES, RoomPlan
from tests.support.simulation.world import START_S

if TYPE_CHECKING:
    from tests.support.simulation.run import Simulation

WATCHED = 50
"""Requests of an instance that are looked at each time, the oldest first."""
_SOURCES = ("at least one", "one address for each", "each at one")
TOLD_S = 1.0
"""In which a decode instance hears that the prefill instance refuses its request."""


class Endings:
    """Checks that requests end, in time and rightly.

    Args:
        simulation: What is checked.
    """

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._world, self._scenario = simulation.world, simulation.scenario
        self._backlog_s = START_BYTES / self._scenario.bytes_per_s[0]
        numbers = [plan.number for plan in self._scenario.rooms]
        self._reused = (
            {number for number in numbers if numbers.count(number) > 1}
            if (len(numbers) < 100)
            else set()
        )

    @property
    def limit_s(self) -> float:
        """By when everything must be over if nothing goes on for ever."""
        scenario = self._scenario
        rooms = scenario.rooms[:100]
        computing_s = sum((plan.chunk_s + 0.1) * (plan.num_pages + 1) for plan in rooms)
        nbytes = sum(plan.num_pages for plan in rooms) * 2**16
        sending_s = 2 * nbytes / scenario.bytes_per_s[0]
        return scenario.quiet_from + computing_s + sending_s + 5 * scenario.deadline_s + 20

    def check_running(self) -> None:
        """Requests that should be over by now are."""
        for instance in (*self._simulation.prefill, *self._simulation.decode):
            for request in list(instance.by_number.values())[:WATCHED]:
                self._check_silence(instance, request)
                self._check_other_side(request)

    def _check_silence(self, instance: Instance, request: SideOfRoom) -> None:
        """A request ends a deadline after the last message from the other side."""
        silent_s = self._world.now - self._last_heard(instance, request)
        if silent_s > self._scenario.deadline_s + SLACK_S:
            self._world.violate(
                f"{request.side}: {request.plan.number} is not over, {silent_s:.1f} s after the "
                f"last message"
            )

    def _last_heard(self, instance: Instance, request: SideOfRoom) -> float:
        began = max(request.now, request.begun_at or 0.0)
        side = request.side
        heard = []
        for rank, environment in enumerate(instance.environments):
            if request.status[rank] in (SUCCESS, FAILED):
                continue
            times = [path.last_delivery.get(side, 0.0) for path in instance.paths(request, rank)]
            if side == "decode":
                times = [min(times, default=self._world.now)]
            heard.append(max(began, environment.paused_until, *times))
        return min(heard, default=self._world.now)

    def _check_other_side(self, request: SideOfRoom) -> None:
        """A request ends a deadline after the other side gave it up."""
        scenario, plan = self._scenario, request.plan
        other = "prefill" if request.side == "decode" else "decode"
        side = self._simulation.sides.get((plan.key, other))
        waits = request.side == "decode" and request.begun_at is None
        if side is None or side.over_at is None or waits or plan.number in self._reused:
            return
        now = self._world.now
        ends = [
            min(now, START_S + fault.at + fault.duration_s)
            for fault in scenario.faults
            if START_S + fault.at < now
        ]
        waited_s = now - max(side.over_at, request.begun_at or request.now, *ends)
        if waited_s > scenario.deadline_s + SLACK_S + self._backlog_s + 4 * scenario.latency_s[1]:
            self._world.violate(
                f"{request.side}: {plan.number} is not over, {waited_s:.1f} s after the other side"
            )

    def check_all(self, over: bool) -> None:
        """Everything is over, and what had no fault of its own succeeded."""
        if not over:
            left = [side for side in self._simulation.sides.values() if side.over_at is None]
            self._world.violate(
                "never over: " + ", ".join(f"{s.side} {s.plan.number}" for s in left[:5])
            )
        for plan in self._scenario.rooms:
            self._check_plan(plan)
        self._world.check()

    def _check_plan(self, plan: RoomPlan) -> None:
        sides = [self._simulation.sides.get((plan.key, side)) for side in ("prefill", "decode")]
        prefill, decode = sides
        if prefill is None or decode is None:
            return
        results = (prefill.result, decode.result)
        bad_codec = self._scenario.codec in ("missing", "broken")
        wrong = plan.fault or plan.abort or plan.number in self._reused or bad_codec
        reasons = "; ".join(prefill.reasons + decode.reasons)
        if self._scenario.strict and not wrong and results != (SUCCESS, SUCCESS):
            self._world.violate(f"{plan.number} ended {results} without a fault: {reasons}")
        if plan.fault in ("prompt", "weights", "refused") and SUCCESS in results:
            self._world.violate(f"{plan.number} ended {results} in spite of {plan.fault}")
        if plan.fault in WRONG_SOURCES and decode.begun_at and not (plan.abort or bad_codec):
            self._check_sources_named(plan, decode)
        if plan.fault == "refused" and decode.begun_at and decode.over_at:
            told_s = decode.over_at - max(decode.begun_at, prefill.over_at or 0.0)
            if told_s > TOLD_S and self._scenario.strict:
                self._world.violate(f"{plan.number} was refused, told after {told_s:.1f} s")

    def _check_sources_named(self, plan: RoomPlan, decode: SideOfRoom) -> None:
        """Wrong prefill ranks are refused in a line that says what is wrong with them."""
        reasons = "; ".join(decode.reasons)
        told = any(f"expected {what} prefill rank" in reasons for what in _SOURCES)
        unneeded = plan.fault == "missing rank" and decode.result == SUCCESS  # heads held by others
        if plan.number not in self._reused and not (told or unneeded):
            self._world.violate(f"{plan.number}: {plan.fault}, decode says {reasons!r}")

    def check_nothing_held(self) -> None:
        """Rooms, parts, buffers, sockets and pages are free again."""
        simulation = self._simulation
        for instance in (*simulation.prefill, *simulation.decode):
            if not instance.alive:
                continue
            for rank in range(instance.tp_size):
                held = instance.check_empty(rank)
                if held:
                    self._world.violate(f"{instance.name}.{rank} holds {held}")
                instance.pools[rank].check_free(instance.free)
        if any(simulation.network.held.values()):
            self._world.violate("ZeroMQ holds memory")
        self._world.check()

    def check_checksums(self, failures: float) -> None:
        """Only what was damaged fails its checksum, and clean links are opened once."""
        network = self._simulation.network
        if failures > network.damaged and not network.changed_memory:
            self._world.violate(f"{failures:g} checksum failures, {network.damaged} damaged")
        opened = max((path.opened for path in network.paths), default=0)
        scenario = self._scenario
        most = 1 if scenario.blocks_are_quick else 2
        # A connection that nobody waits for any more is closed before it is ready.
        given_up = scenario.profile == "misuse" or any(plan.abort for plan in scenario.rooms)
        if not scenario.faults and not given_up and opened > most:
            self._world.violate(f"a clean link was opened {opened} times")
        self._world.check()
