"""Sockets of the simulation: what the transfer uses of ZeroMQ's DEALER, ROUTER and monitors."""

from __future__ import annotations

import errno
import struct
from collections import deque
from typing import TYPE_CHECKING, Any

import zmq

from sgl_kvq.transfer.protocol.header import HEADER_BYTES
from tests.support.simulation.network import Message, Network, Wire

if TYPE_CHECKING:
    from tests.support.simulation.environment import SimulatedEnvironment

RECONNECT_S = (0.1, 2.0)
_ROOM_NONCE_SEQ = struct.Struct("<8xQQ8xI")


class Frame:
    """A received frame."""

    __slots__ = ("bytes", "more")

    def __init__(self, data: bytes, more: bool) -> None:
        self.bytes, self.more = data, more

    @property
    def buffer(self) -> memoryview:
        return memoryview(self.bytes)

    def get(self, option: int) -> int:
        assert option == zmq.SRCFD
        return -1


class Socket:
    """What all kinds have in common: options are taken, frames of a message come one by one."""

    def __init__(self, environment: SimulatedEnvironment) -> None:
        self.environment = environment
        self.network: Network = environment.network
        self.world = environment.network.world
        self.closed = False
        self._frames: deque[Frame] = deque()

    def setsockopt(self, option: int, value: Any) -> None:
        pass

    @property
    def readable(self) -> bool:
        raise NotImplementedError

    def _next_message(self) -> list[bytes]:
        raise NotImplementedError

    def recv(self, flags: int = 0, copy: bool = True) -> Frame:
        self._check_open()
        if not self._frames:
            if not self.readable:
                raise zmq.Again
            frames = self._next_message()
            last = len(frames) - 1
            self._frames.extend(Frame(data, i < last) for i, data in enumerate(frames))
        return self._frames.popleft()

    def recv_multipart(self, flags: int = 0) -> list[bytes]:
        frames = [self.recv(flags)]
        while frames[-1].more:
            frames.append(self.recv(flags))
        return [frame.bytes for frame in frames]

    def _check_open(self) -> None:
        if self.closed:
            raise zmq.ZMQError(errno.ENOTSOCK)


class Monitor(Socket):
    """Tells of connections that broke."""

    def __init__(self, environment: SimulatedEnvironment) -> None:
        super().__init__(environment)
        self._events = 0

    @property
    def readable(self) -> bool:
        return self._events > 0

    def note(self) -> None:
        self._events += 1
        self.environment.on_readable(self)

    def _next_message(self) -> list[bytes]:
        self._events -= 1
        return [struct.pack("=hi", int(zmq.EVENT_DISCONNECTED), 0), b""]

    def close(self, linger: int | None = None) -> None:
        self.closed = True


class Dealer(Socket):
    """Connects to one address, and again after a break; its pipe outlives connections."""

    def __init__(self, environment: SimulatedEnvironment) -> None:
        super().__init__(environment)
        self.identity = b""
        self.outbox: deque[Message] = deque()
        self._inbox: deque[list[bytes]] = deque()
        self._wire: Wire | None = None
        self._monitor: Monitor | None = None
        self._wait_s = RECONNECT_S[0]

    def setsockopt(self, option: int, value: Any) -> None:
        if option == zmq.ROUTING_ID:
            self.identity = value

    def get_monitor_socket(self, events: int) -> Monitor:
        assert events == zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED
        self._monitor = self.environment.open_socket(Monitor(self.environment))
        return self._monitor

    def disable_monitor(self) -> None:
        self._monitor = None

    def connect(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.path = self.network.path(self.environment.name, endpoint)
        self.world.after(3 * self.path.latency_s, self._try)

    def _try(self) -> None:
        if self.closed or self._wire is not None:
            return
        path, router = self.path, self.network.router(self.endpoint)
        if path.stalled:
            path.waiting.append(self._try)
        elif path.refused or router is None:
            self._try_later()
        elif path.rejected:
            self._tell_monitor()
            if self.world.chance(0.5):  # after an error of the protocol ZeroMQ gives up
                self._try_later()
        else:
            self.world.trace(path.name, "connected")
            self._wait_s = RECONNECT_S[0]
            self._wire = Wire(self.network, path, self, router)
            router.attach(self._wire)
            self._wire.up.pump()

    def _try_later(self) -> None:
        self.world.after(self._wait_s * self.world.rng.uniform(1, 1.5), self._try)
        self._wait_s = min(2 * self._wait_s, RECONNECT_S[1])

    def on_broken(self, wire: Wire) -> None:
        """The connection's end becomes known here."""
        if self._wire is not wire or self.closed:
            return
        self._wire = None
        self._tell_monitor()
        self._try_later()

    def _tell_monitor(self) -> None:
        if self._monitor is not None:
            self._monitor.note()

    def send_multipart(self, frames: list[bytes], flags: int = 0) -> None:
        self._check_open()
        self.outbox.append(Message(list(frames), []))
        if self._wire is not None:
            self._wire.up.pump()

    @property
    def readable(self) -> bool:
        return bool(self._inbox or self._frames)

    def _next_message(self) -> list[bytes]:
        return self._inbox.popleft()

    def deliver(self, frames: list[bytes]) -> None:
        if not self.closed:
            self._inbox.append(frames)
            self.environment.on_readable(self)

    def close(self, linger: int | None = None) -> None:
        assert linger == 0
        self.closed = True
        if self._wire is not None:
            self._wire.close_by_dealer()
        self.network.drop(self.outbox)

    def kill(self) -> None:
        self.closed = True
        if self._wire is not None:
            self._wire.cut()


class Router(Socket):
    """Listens; a later connection with a routing id takes it over (ROUTER_HANDOVER)."""

    def __init__(self, environment: SimulatedEnvironment) -> None:
        super().__init__(environment)
        self._options: dict[int, int] = {}
        self._wires: dict[bytes, Wire] = {}
        self._turns: deque[Wire] = deque()
        self._outgoing: list[bytes | memoryview] = []
        self._held: list[int] = []
        self._endpoint = ""
        self._monitor = environment.open_socket(Monitor(environment))

    def setsockopt(self, option: int, value: Any) -> None:
        self._options[option] = value

    def get_monitor_socket(self, events: int) -> Monitor:
        return self._monitor

    def disable_monitor(self) -> None:
        self._monitor.close()

    def getsockopt_string(self, option: int) -> str:
        assert option == zmq.LAST_ENDPOINT
        return self._endpoint

    def bind(self, endpoint: str) -> None:
        assert self._options == {zmq.ROUTER_MANDATORY: 1, zmq.ROUTER_HANDOVER: 1}
        if endpoint in self.network.routers:
            raise zmq.ZMQError(errno.EADDRINUSE)
        self._endpoint = endpoint
        self.network.routers[endpoint] = self

    def attach(self, wire: Wire) -> None:
        """A connection has passed ZeroMQ's handshake."""
        identity = wire.dealer.identity
        for older in self._turns:
            if older.dealer.identity == identity:
                taken = older is self._turns[0]  # a poll has taken the first message
                while len(older.inbound) > taken:
                    older.inbound.pop()
        old = self._wires.get(identity)
        self._wires[identity] = wire
        if old is not None:
            self.network.drop(old.down.pipe)
            old.cut()

    def on_broken(self, wire: Wire) -> None:
        """The connection's end becomes known here; what has arrived can still be read."""
        self.network.drop(wire.down.pipe)
        if self._wires.get(wire.dealer.identity) is wire:
            del self._wires[wire.dealer.identity]

    def deliver(self, wire: Wire, frames: list[bytes]) -> None:
        if self.closed:
            return
        wire.inbound.append([wire.dealer.identity, *frames])
        if wire not in self._turns:
            self._turns.append(wire)
        self.environment.on_readable(self)

    @property
    def readable(self) -> bool:
        while self._turns and not self._turns[0].inbound:
            self._turns.popleft()
        return bool(self._turns or self._frames)

    def _next_message(self) -> list[bytes]:
        wire = self._turns.popleft()
        frames = wire.inbound.popleft()
        if wire.inbound:
            self._turns.append(wire)
        return frames

    def send_multipart(self, frames: list[bytes], flags: int = 0) -> None:
        for i, frame in enumerate(frames):
            self.send(frame, flags | (zmq.SNDMORE if i < len(frames) - 1 else 0))

    def send(self, frame: bytes | memoryview, flags: int = 0, copy: bool = True) -> None:
        self._check_open()
        if not self._outgoing and frame not in self._wires:
            raise zmq.ZMQError(errno.EHOSTUNREACH)
        if copy or isinstance(frame, bytes):
            frame = bytes(frame)
        else:
            self._held.append(id(frame.obj.base))
        self._outgoing.append(frame)
        if flags & zmq.SNDMORE:
            return
        identity, *frames = self._outgoing
        message = Message(frames, self._held)
        self._outgoing, self._held = [], []
        self.network.hold(message)
        wire = self._wires[identity]
        if frames[0] == b"B":
            self._note_blocks(wire, frames[1])
        wire.down.pipe.append(message)
        wire.down.pump()

    def _note_blocks(self, wire: Wire, headers: bytes) -> None:
        """A block is sent again on a new connection, or after damage, as by a freed page."""
        if not self.network.can_undo:
            self.world.violate("a block is sent that the decode rank cannot undo")
        damage = self.network.damaged or self.network.nacked
        for start in range(0, len(headers), HEADER_BYTES):
            block = _ROOM_NONCE_SEQ.unpack_from(headers, start)
            if block in wire.sent and not damage:
                self.world.violate(
                    f"block {block[2]} of {block[0]} is sent again on {wire.path.name}"
                )
            wire.sent.add(block)

    def close(self, linger: int | None = None) -> None:
        """What is queued still leaves, as with a short linger."""
        self._leave()
        for wire in list(self._wires.values()):
            wire.down.pump()
            end = max(wire.down.last_arrival, self.world.now) + wire.path.latency_s
            self.world.at(end, wire.cut)

    def kill(self) -> None:
        self._leave()
        for wire in list(self._wires.values()):
            wire.cut()

    def _leave(self) -> None:
        self.closed = True
        self.network.routers.pop(self._endpoint, None)
