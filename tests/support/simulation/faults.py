"""What goes wrong in a scenario."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from tests.support.simulation.instances import Instance
from tests.support.simulation.network import Network, Path
from tests.support.simulation.scenario import Fault

_T = TypeVar("_T")
_TRAPS = (b"done", b"done", b"request", b"ack", b"hello", b"welcome", b"abort", b"B")
HALF_OPEN_S = 15.0
"""ZeroMQ's heartbeats end a connection whose other end is gone after that."""


class Faults:
    """Applies faults; each kind is a method.

    Args:
        network: Of all instances.
        prefill: Instances of this side.
        decode: Likewise.
    """

    def __init__(
        self, network: Network, prefill: Sequence[Instance], decode: Sequence[Instance]
    ) -> None:
        self._network, self._world = network, network.world
        self._prefill, self._decode = prefill, decode

    def apply(self, fault: Fault) -> None:
        self._world.trace("fault", f"{fault.kind} for {fault.duration_s:.2f} s")
        getattr(self, fault.kind)(fault)

    def _pick(self, things: Sequence[_T], fault: Fault) -> _T | None:
        return things[int(fault.target * len(things))] if things else None

    def _path(self, fault: Fault) -> Path | None:
        return self._pick(self._network.paths, fault)

    def _later(self, fault: Fault, action: Callable[[], None]) -> None:
        self._world.after(fault.duration_s, action)

    def cut(self, fault: Fault) -> None:
        """A connection breaks; both ends learn of it soon, or one of them late."""
        path = self._path(fault)
        for wire in list(path.wires) if path else []:
            wire.cut(0.1 * fault.size, 0.1 * (1 - fault.size))

    def half_open(self, fault: Fault) -> None:
        path = self._path(fault)
        for wire in list(path.wires) if path else []:
            late_s = HALF_OPEN_S * (1 + fault.duration_s / 60)
            wire.cut(*((0.0, late_s) if fault.size < 0.5 else (late_s, 0.0)))

    def cut_on(self, fault: Fault) -> None:
        """A connection breaks as a message of some kind leaves."""
        path = self._path(fault)
        if path:
            path.trap = _TRAPS[int(fault.size * len(_TRAPS))]

    def cut_unread(self, fault: Fault) -> None:
        """A connection breaks while the prefill rank stands still, with messages unread there."""
        path = self._path(fault)
        router = self._network.router(path.endpoint) if path else None
        if path is None or router is None:
            return
        environment, end = router.environment, self._world.now + fault.duration_s
        environment.paused_until = max(environment.paused_until, end)
        self._world.after(fault.size * fault.duration_s, lambda: self.cut(fault))

    def cut_all(self, fault: Fault) -> None:
        for path in self._network.paths:
            for wire in list(path.wires):
                wire.cut(0.1 * fault.size, 0.1 * (1 - fault.size))

    def stall(self, fault: Fault) -> None:
        path = self._path(fault)
        if path:
            self._network.stall(path, fault.duration_s)

    def refuse(self, fault: Fault) -> None:
        """Nobody can connect, as when a firewall comes up."""
        path = self._path(fault)
        if path:
            path.refused = True
            self._later(fault, lambda: setattr(path, "refused", False))
            self.cut(fault)

    def reject(self, fault: Fault) -> None:
        """Connections are closed in ZeroMQ's handshake: keys were changed on one side."""
        path = self._path(fault)
        if path:
            path.rejected = True
            self._later(fault, lambda: setattr(path, "rejected", False))
            self.cut(fault)

    def slow(self, fault: Fault) -> None:
        path = self._path(fault)
        if path:
            before, path.bytes_per_s = path.bytes_per_s, 10_000 * 30**fault.size
            self._later(fault, lambda: setattr(path, "bytes_per_s", before))

    def damage(self, fault: Fault) -> None:
        path = self._path(fault)
        if path:
            path.damage += 1 + int(3 * fault.size)

    def garble(self, fault: Fault) -> None:
        """Control messages that nobody can read, in either direction."""
        path = self._path(fault)
        if path:
            path.garbled += 1 + int(4 * fault.size)

    def pause(self, fault: Fault) -> None:
        """A process stands still."""
        instance = self._pick([*self._prefill, *self._decode], fault)
        if instance:
            environment = self._pick(instance.environments, fault)
            if environment:
                end = self._world.now + fault.duration_s
                environment.paused_until = max(environment.paused_until, end)

    def no_descriptors(self, fault: Fault) -> None:
        instance = self._pick(self._decode, fault)
        for environment in instance.environments if instance else []:
            environment.out_of_descriptors = True
            self._later(fault, lambda e=environment: setattr(e, "out_of_descriptors", False))
        self.cut_all(fault)

    def restart_prefill(self, fault: Fault) -> None:
        self._restart(self._pick(self._prefill, fault), fault)

    def restart_decode(self, fault: Fault) -> None:
        self._restart(self._pick(self._decode, fault), fault)

    def _restart(self, instance: Instance | None, fault: Fault) -> None:
        if instance is None or not instance.alive:
            return
        instance.kill()
        self._later(fault, instance.start)
