"""The listening socket of a prefill rank, and the decode ranks that passed the handshake."""

from __future__ import annotations

from pathlib import Path

import zmq
from zmq.auth.thread import ThreadAuthenticator

from sgl_kvq.errors import ConfigError, TransferError
from sgl_kvq.transfer.codecs.registry import get_codec
from sgl_kvq.transfer.prefill.pace import Pace
from sgl_kvq.transfer.prefill.rooms import Peer, next_seqno
from sgl_kvq.transfer.protocol.handshake import check_codec, check_fingerprint
from sgl_kvq.transfer.protocol.header import WIRE_VERSION
from sgl_kvq.transfer.protocol.messages import Hello, Message, Refuse, Welcome, pack_message
from sgl_kvq.transfer.runtime.curve import secure_server
from sgl_kvq.transfer.runtime.environment import Environment
from sgl_kvq.transfer.runtime.event_loop import CONTROL
from sgl_kvq.transfer.runtime.rank import Rank

MAX_PEERS = 1024


class Listener:
    """Accepts decode ranks and sends messages to them.

    Args:
        rank: The prefill rank.
        environment: That of the transfer thread.
        tp_rank: Added to a fixed port.

    Attributes:
        socket: ROUTER socket.
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
        self.socket = environment.make_socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.socket.ipv6 = ":" in rank.config.host
        keys = rank.config.keys
        self._authenticator = self._secure(keys) if keys else None
        self.port = self._bind(tp_rank)
        environment.watch(self.socket)

    def _secure(self, keys: Path) -> ThreadAuthenticator:
        try:
            return secure_server(self.socket, keys)
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

    def forget_idle(self) -> None:
        """Forget peers that have no transfers and have been silent for several deadlines."""
        oldest = self._environment.now() - 4 * self._rank.config.deadline_s
        for peer in list(self.peers.values()):
            if not peer.parts and peer.last_heard < oldest:
                del self.peers[peer.identity]

    def close(self) -> None:
        """Stop listening."""
        self.socket.close(linger=200)
        if self._authenticator is not None:
            self._authenticator.stop()
