"""The network: paths with their speed and faults, connections on them, and what is on the way.

A message waits in ZeroMQ's pipe, then in the kernel's buffer, then on the way. A connection that
breaks loses what has left the pipe; the pipe of a DEALER lives on, that of a ROUTER does not.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.support.simulation.trace import describe
from tests.support.simulation.world import World

if TYPE_CHECKING:
    from tests.support.simulation.pools import SimulatedPool
    from tests.support.simulation.sockets import Dealer, Router

_GARBAGE = bytes([0xC1])  # not msgpack
KEEPALIVE_S = (15.0, 20.0)


class Message:
    """Frames on their way; memory that is not copied is held until they leave the pipe."""

    __slots__ = ("frames", "held", "size")

    def __init__(self, frames: list[bytes | memoryview], held: list[int]) -> None:
        self.frames, self.held = frames, held
        self.size = sum(map(len, frames)) + 16


@dataclass(eq=False)
class Path:
    """The way from a decode rank to a prefill rank, and what is wrong with it now.

    Args:
        rank: Name of the decode rank.
        endpoint: Address of the prefill rank.
        latency_s: One way.
        bytes_per_s: Towards the decode rank; the other way is as fast.
        kernel_bytes: What the kernel takes from ZeroMQ before it has arrived.
    """

    rank: str
    endpoint: str
    latency_s: float
    bytes_per_s: float
    kernel_bytes: int
    refused: bool = False
    rejected: bool = False
    stalled: bool = False
    damage: int = 0
    garbled: int = 0
    trap: bytes = b""  # the connection breaks as this kind of message leaves
    wires: list[Wire] = field(default_factory=list)
    waiting: list[Callable[[], None]] = field(default_factory=list)
    opened: int = 0
    last_delivery: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.rank}:{self.endpoint[-3:]}"


class Lane:
    """One direction of a connection.

    Args:
        wire: The connection.
        pipe: Messages that ZeroMQ holds.
        deliver: Called with each message that arrives.
    """

    def __init__(self, wire: Wire, pipe: deque[Message], deliver: Callable[[Message], None]):
        self.wire, self.pipe, self._deliver = wire, pipe, deliver
        self._kernel: deque[Message] = deque()
        self._used = self._due = 0
        self._free_at = self.last_arrival = 0.0
        self.dead = False

    def pump(self) -> None:
        """Move messages from the pipe to the kernel, which copies them."""
        path, world = self.wire.path, self.wire.network.world
        while self.pipe and self._used < path.kernel_bytes:
            message = self.pipe.popleft()
            message.frames = [bytes(frame) for frame in message.frames]
            self.wire.network.release(message)
            self._used += message.size
            self._free_at = max(self._free_at, world.now) + message.size / path.bytes_per_s
            self.last_arrival = max(self.last_arrival, self._free_at + path.latency_s)
            self._kernel.append(message)
            if path.trap and path.trap in message.frames[message.frames[0] == b"C"]:
                path.trap = b""
                world.after(0.0, self.wire.cut)
            world.at(self.last_arrival, self._arrive)

    def _arrive(self) -> None:
        if self.dead:
            return
        if self.wire.path.stalled:
            self._due += 1
            return
        message = self._kernel.popleft()
        self._used -= message.size
        self._deliver(message)
        if self.pipe and not self.dead:
            self.pump()

    def resume(self) -> None:
        """Deliver what was due while the path was stalled."""
        due, self._due = self._due, 0
        for _ in range(due):
            self._arrive()


class Wire:
    """One TCP connection between a DEALER and a ROUTER."""

    def __init__(self, network: Network, path: Path, dealer: Dealer, router: Router) -> None:
        self.network, self.path, self.dealer, self.router = network, path, dealer, router
        self.inbound: deque[list[bytes]] = deque()  # the ROUTER's
        self.up = Lane(self, dealer.outbox, self._to_router)
        self.down = Lane(self, deque(), self._to_dealer)
        self.greeted = False  # whether the prefill rank has read a Hello from it
        self.sent: set[tuple[int, ...]] = set()  # blocks, since the last one
        path.wires.append(self)
        path.opened += 1

    def _to_router(self, message: Message) -> None:
        self.network.arrived(self.path, "prefill", message)
        self.router.deliver(self, message.frames)

    def _to_dealer(self, message: Message) -> None:
        self.network.arrived(self.path, "decode", message)
        self.dealer.deliver(message.frames)

    def cut(self, dealer_after_s: float = 0.0, router_after_s: float = 0.0) -> None:
        """Lose what is on the way; each end notices after a time of its own."""
        if self.up.dead and self.down.dead:
            return
        self.network.world.trace(self.path.name, "connection breaks")
        self.up.dead = self.down.dead = True
        if self in self.path.wires:
            self.path.wires.remove(self)
        self.network.world.after(dealer_after_s, lambda: self.dealer.on_broken(self))
        self.network.world.after(router_after_s, lambda: self.router.on_broken(self))

    def close_by_dealer(self) -> None:
        """What the kernel has still arrives, then the ROUTER learns of the end."""
        self.down.dead = True
        self.network.drop(self.up.pipe)
        world = self.network.world

        def end() -> None:
            if self.path.stalled:
                self.path.waiting.append(end)
            else:
                self.cut()

        world.at(max(self.up.last_arrival, world.now) + self.path.latency_s, end)


class Network:
    """Paths by decode rank and address, listening sockets, and memory that sockets hold."""

    def __init__(self, world: World, make_path: Callable[[str, str], Path]) -> None:
        self.world = world
        self.routers: dict[str, Router] = {}
        self.aliases: dict[str, str] = {}
        self.held: Counter[int] = Counter()
        self.can_undo = True  # whether decode ranks have the codec of the prefill ranks
        self.damaged = 0
        self.nacked = False
        self.changed_memory = False  # pages were freed while they may have been on the way
        self.pools: list[SimulatedPool] = []
        self._paths: dict[tuple[str, str], Path] = {}
        self._make_path = make_path

    @property
    def paths(self) -> list[Path]:
        return list(self._paths.values())

    def path(self, rank: str, endpoint: str) -> Path:
        """The way from a decode rank to an address."""
        key = (rank, endpoint)
        if key not in self._paths:
            self._paths[key] = self._make_path(rank, endpoint)
        return self._paths[key]

    def router(self, endpoint: str) -> Router | None:
        """Who listens there; a proxy may have an address of its own."""
        return self.routers.get(self.aliases.get(endpoint, endpoint))

    def arrived(self, path: Path, side: str, message: Message) -> None:
        """Note a delivery, and damage the message if that is its fate."""
        path.last_delivery[side] = self.world.now
        self.nacked |= message.frames[0] == b"C" and b"nack" in message.frames[1]
        if path.damage and side == "decode" and message.frames[0] == b"B":
            path.damage -= 1
            self.damaged += 1
            message.frames = self._damage(message.frames)
        elif path.garbled and message.frames[0] == b"C":
            path.garbled -= 1
            self.damaged += 1
            self.world.trace(path.name, f"garbled: {describe(message.frames)}")
            message.frames = [b"C", _GARBAGE]
        if self.world.tracing:
            self.world.trace(path.name, f"-> {side}: {describe(message.frames)}")

    def _damage(self, frames: list[bytes]) -> list[bytes]:
        """Flip a bit of a payload, of the headers, or of what kind of message it is."""
        rng = self.world.rng
        index = rng.randrange(2, len(frames)) if rng.random() < 0.6 else rng.randrange(2)
        data = bytearray(frames[index])
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        self.world.trace("damage", f"frame {index} of {len(frames)}")
        return [*frames[:index], bytes(data), *frames[index + 1 :]]

    def hold(self, message: Message) -> None:
        for memory in message.held:
            self.held[memory] += 1

    def release(self, message: Message) -> None:
        for memory in message.held:
            self.held[memory] -= 1
        message.held = []

    def drop(self, pipe: deque[Message]) -> None:
        """Forget messages that will not be sent."""
        for message in pipe:
            self.release(message)
        pipe.clear()

    # Faults.

    def stall(self, path: Path, duration_s: float) -> None:
        """Nothing passes for a time; the kernel's keepalives find out after a longer one."""
        if path.stalled:
            return
        path.stalled = True
        self.world.trace(path.name, f"stalls for {duration_s:.2f} s")
        wires = list(path.wires)

        def find_out() -> None:
            for wire in wires:
                wire.cut()

        keepalive_s = self.world.rng.uniform(*KEEPALIVE_S)
        if duration_s > keepalive_s:
            self.world.after(keepalive_s, find_out)
        self.world.after(duration_s, lambda: self._resume(path))

    def _resume(self, path: Path) -> None:
        path.stalled = False
        self.world.trace(path.name, "passes again")
        waiting, path.waiting = path.waiting, []
        for lane in [lane for wire in list(path.wires) for lane in (wire.up, wire.down)]:
            lane.resume()
        for action in waiting:
            action()
