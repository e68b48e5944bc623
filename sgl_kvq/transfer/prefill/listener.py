"""The listening socket of a prefill rank, and the decode ranks that passed the handshake."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

import zmq
from zmq.utils.monitor import recv_monitor_message

from sgl_kvq.errors import ConfigError, TransferError
from sgl_kvq.transfer.codecs.registry import get_codec
from sgl_kvq.transfer.prefill.door import Door
from sgl_kvq.transfer.prefill.pace import Pace
from sgl_kvq.transfer.prefill.rooms import Peer, next_seqno
from sgl_kvq.transfer.protocol.handshake import check_codec, check_fingerprint
from sgl_kvq.transfer.protocol.header import WIRE_VERSION
from sgl_kvq.transfer.protocol.messages import (
    MAX_MESSAGE_BYTES,
    Hello,
    Message,
    Refuse,
    Welcome,
    pack_message,
)
from sgl_kvq.transfer.runtime.curve import CurveServer
from sgl_kvq.transfer.runtime.environment import MAX_QUEUED_MESSAGES, Environment
from sgl_kvq.transfer.runtime.event_loop import CONTROL
from sgl_kvq.transfer.runtime.rank import Rank

logger = logging.getLogger(__name__)

MAX_PEERS = 1024
MAX_HALF_OPEN = 8
"""Connections that wait in the kernel to be accepted."""
HELLO_S = 10.0
"""A connection without a valid Hello is dropped after this time."""
HELLO_BYTES = 4 * 2**10
"""All that may come before it, apart from as much as our own takes."""
PEER_BUFFER_BYTES = 64 * 2**10
"""The kernel's receive buffer for a decode rank."""
PEER_BYTES = (MAX_QUEUED_MESSAGES + 1) * (MAX_MESSAGE_BYTES + 2**12)
"""What a decode rank may send between two messages that are taken: those that wait and one."""


class Listener:
    """Accepts decode ranks and sends messages to them.

    Args:
        rank: The prefill rank.
        environment: That of the transfer thread.
        tp_rank: Added to a fixed port.

    Attributes:
        socket: ROUTER socket.
        monitor: Socket that reports accepted connections.
        port: Where it listens.
        peers: Decode ranks by routing id.

    Raises:
        ConfigError: the address is taken or not ours, or a key file is missing; the environment is
            closed.
    """

    def __init__(self, rank: Rank, environment: Environment, tp_rank: int) -> None:
        self._rank, self._environment = rank, environment
        self._codec = get_codec(rank.config.codec)
        self.peers: dict[bytes, Peer] = {}
        hello = Hello(WIRE_VERSION, rank.instance, rank.fingerprint, [])
        self._stranger_bytes = HELLO_BYTES + len(pack_message(hello))
        self.socket = environment.make_socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.socket.backlog = MAX_HALF_OPEN
        self.socket.ipv6 = ":" in rank.config.host
        self._inbound = environment.inbound
        self._door: Door | None = None
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_LISTENING | zmq.EVENT_ACCEPTED)
        keys = rank.config.keys
        self._curve = self._secure(keys) if keys else None
        self.port = self._bind(tp_rank)
        self._endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._failed_binds = 0
        environment.watch(self.monitor)
        environment.watch(self.socket)

    def _secure(self, keys: Path) -> CurveServer:
        try:
            return CurveServer(self.socket, keys)
        except ConfigError:
            self._environment.close()  # Python would wait for the open socket at exit
            raise

    def _bind(self, tp_rank: int) -> int:
        config = self._rank.config
        host = f"[{config.host}]" if ":" in config.host else config.host
        port = config.port + tp_rank if config.port else 0
        try:
            if port:
                self.socket.bind(f"tcp://{host}:{port}")
                return port
            return int(self.socket.bind_to_random_port(f"tcp://{host}"))
        except zmq.ZMQError as error:
            self.close()
            self._environment.close()
            raise ConfigError(
                f"--kv-quant-transfer-host {host}: cannot listen on port {port or 'any'} ({error})"
            ) from error

    def _listen_again(self) -> None:
        """Close all connections and accept new ones, which use the socket's new keys.

        Decode ranks connect again by themselves, and their transfers go on.
        """
        if self._door is not None:
            self._door.close()  # it would keep the port
        with suppress(zmq.ZMQError):  # unbound by the last try
            self.socket.unbind(self._endpoint)
        try:
            self.socket.bind(self._endpoint)
            self._failed_binds = 0
        except zmq.ZMQError as error:  # until ZeroMQ has closed the old one; the next tick tries
            self._failed_binds += 1
            if self._failed_binds == 20:
                logger.error("kvq-zmq: cannot listen on %s again: %s", self._endpoint, error)

    def on_events(self) -> None:
        """Note what the monitor reports."""
        with suppress(zmq.Again):
            while True:
                event = recv_monitor_message(self.monitor, zmq.NOBLOCK)
                now = self._environment.now()
                if event["event"] == zmq.EVENT_LISTENING:
                    self._door = Door(event["value"], self._environment.now)
                elif self._door is not None:
                    self._door.enter()
                    self._inbound.add(
                        event["value"],
                        self.port,
                        self._stranger_bytes,
                        now + HELLO_S,
                        self._door.flooded,
                    )

    def took(self, identity: bytes, frame: zmq.Frame) -> None:
        """A message was taken and handled; a peer may send more after that, a stranger may not."""
        if identity not in self.peers:
            return
        descriptor = int(frame.get(zmq.SRCFD))
        if descriptor not in self._inbound:
            self.on_events()
        if not self._inbound.prove(descriptor, PEER_BYTES, PEER_BUFFER_BYTES):
            self._inbound.took(descriptor)
        elif self._door is not None:
            self._door.leave()

    def on_hello(self, identity: bytes, hello: Hello) -> None:
        """Accept a decode rank, or tell it why not."""
        try:
            check_fingerprint(self._rank.fingerprint, hello.fingerprint)
            check_codec(self._codec.name, self._codec.package, hello.codecs)
            if identity not in self.peers and len(self.peers) >= MAX_PEERS:
                raise TransferError(f"{MAX_PEERS} decode ranks are connected already")
        except TransferError as error:
            self.refuse(identity, str(error))
            return
        now = self._environment.now()
        known = self.peers.get(identity)
        if known is None or known.instance != hello.instance:
            pace = Pace(self._rank.config, now)
            self.peers[identity] = Peer(identity, hello.instance, pace, now)
        else:
            known.reachable, known.last_heard, known.connected = True, now, next_seqno()
        heads = self._rank.access.heads
        self._send(identity, Welcome(WIRE_VERSION, self._rank.instance, heads.first, heads.count))

    def refuse(self, identity: bytes, reason: str) -> None:
        """Tell somebody why the handshake failed."""
        self._send(identity, Refuse(reason[:4000]))

    def tell(self, peer: Peer, message: Message) -> None:
        """Send a message to a peer; one that is not connected misses it."""
        if peer.reachable:
            self._send(peer.identity, message)

    def _send(self, identity: bytes, message: Message) -> None:
        try:
            self.socket.send_multipart([identity, CONTROL, pack_message(message)], zmq.NOBLOCK)
        except zmq.ZMQError:
            if identity in self.peers:
                self.peers[identity].reachable = False

    def tick(self) -> None:
        """Use keys that changed; forget peers without transfers that were silent for long."""
        if self._curve is not None and (self._curve.refresh() or self._failed_binds):
            self._listen_again()
        self._inbound.sweep()
        if self._door is not None:
            self._door.tick()
        oldest = self._environment.now() - 4 * self._rank.config.deadline_s
        for peer in list(self.peers.values()):
            if not peer.parts and peer.last_heard < oldest:
                del self.peers[peer.identity]

    def close(self) -> None:
        """Stop listening."""
        if self._door is not None:
            self._door.close()
        self.socket.disable_monitor()
        self.socket.close(linger=200)
        if self._curve is not None:
            self._curve.stop()
