"""A decode rank's connections to prefill ranks; `client` decides what is sent over them."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum

import zmq

from sgl_kvq.errors import TransferError
from sgl_kvq.memory_pool.page_io.span import HeadRange
from sgl_kvq.transfer.decode.assembly import IncomingBlock, IncomingPart
from sgl_kvq.transfer.options import TransferConfig, is_loopback
from sgl_kvq.transfer.protocol.header import MAX_BLOCK_BYTES
from sgl_kvq.transfer.protocol.messages import Hello, Message, pack_message
from sgl_kvq.transfer.runtime.curve import KeyFolder, load_client_keys, secure_client
from sgl_kvq.transfer.runtime.environment import MAX_QUEUED_MESSAGES, Environment
from sgl_kvq.transfer.runtime.event_loop import CONTROL
from sgl_kvq.transfer.runtime.request_state import RequestState

logger = logging.getLogger(__name__)

WELCOME_BYTES = 8 * 2**10
"""What a prefill rank may send before its first welcome."""
PROVEN_BYTES = (MAX_QUEUED_MESSAGES + 1) * (MAX_BLOCK_BYTES + 2**20)
"""What a prefill rank may send between two messages that are taken: those that wait and one."""


class ConnectionState(Enum):
    """State of the handshake.

    CONNECTING: no answer yet.
    WELCOMED: accepted; blocks that came before the Welcome are still being written.
    READY: accepted, and rooms have been requested.
    REFUSED: the prefill rank does not fit.
    """

    CONNECTING = "connecting"
    WELCOMED = "welcomed"
    READY = "ready"
    REFUSED = "refused"


@dataclass(eq=False)
class Connection:
    """A connection to one prefill rank.

    Args:
        endpoint: tcp:// address.
        identity: Routing id; kept over reconnects, so that the prefill rank knows its peer.
        socket: DEALER socket.
        monitor: Socket that reports when the connection breaks.
        opened: When it was opened, in seconds.
        last_heard: Time of the last message, in seconds.
        reason: Why the handshake was refused.
        instance: Random number of the prefill process; None before the handshake.
        heads: KV heads that the prefill rank holds.
        hello_sent: Time of the last Hello, in seconds.
        broken: Whether it must be replaced.
        damaged: Time of the last message or block that could not be read, in seconds.
        reconnected_silent: Whether the connection before was silent, and blocks are slow since.
        waiting: Nonce, state and time of arrival of rooms that have no pages yet.
        parts: Rooms whose blocks arrive here.
        blocks: Blocks that are being verified and written, in order of arrival.
        last_block: Last of them that came before the Welcome, while it is `WELCOMED`.
        finished: Nonce of rooms that ended with success, in case the last message is lost.
        descriptor: ZeroMQ's, once it is connected.
        proven: Whether a block came for one of its rooms, with the right fingerprint.
        last_finished: When the last of them did, in seconds.
    """

    endpoint: str
    identity: bytes
    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    opened: float
    last_heard: float
    state: ConnectionState = ConnectionState.CONNECTING
    reason: str = ""
    instance: int | None = None
    heads: HeadRange = field(default_factory=lambda: HeadRange(0, 0))
    hello_sent: float = 0.0
    broken: bool = False
    damaged: float = 0.0
    reconnected_silent: bool = False
    waiting: dict[int, tuple[int, RequestState, float]] = field(default_factory=dict)
    parts: dict[int, IncomingPart] = field(default_factory=dict)
    blocks: deque[IncomingBlock] = field(default_factory=deque)
    last_block: IncomingBlock | None = None
    finished: dict[int, int] = field(default_factory=dict)
    descriptor: int = -1
    proven: bool = False
    last_finished: float = -math.inf

    @property
    def patience(self) -> float:
        """How long it may be silent, in deadlines; on a new connection, slow blocks get more."""
        ready = self.state is ConnectionState.READY
        return 2 / 3 if ready and self.reconnected_silent else 1 / 3

    @property
    def in_use(self) -> bool:
        """Whether a room depends on it."""
        return bool(self.waiting or self.parts)


class Connections:
    """Connections by endpoint and by socket.

    Args:
        environment: That of the transfer thread.
        config: Keys.
        hello: First message on a connection.
        stranger_bytes: What a prefill rank that is not proven may send between two messages.
        on_flood: Called with a connection that was dropped because of what it sent.
    """

    def __init__(
        self,
        environment: Environment,
        config: TransferConfig,
        hello: Hello,
        stranger_bytes: int,
        on_flood: Callable[[Connection], None],
    ) -> None:
        self.by_endpoint: dict[str, Connection] = {}
        self.by_socket: dict[zmq.Socket[bytes], Connection] = {}
        self._environment, self._hello = environment, hello
        self._keys = KeyFolder(config.keys, load_client_keys) if config.keys else None
        self._inbound, self._stranger_bytes = environment.inbound, stranger_bytes
        self._on_flood = on_flood

    def get_or_connect(self, endpoint: str) -> Connection:
        """The connection to a prefill rank.

        Raises:
            TransferError: the address is beyond loopback and there are no keys.
            ConfigError: a key file is missing.
            zmq.ZMQError: not an address.
        """
        known = self.by_endpoint.get(endpoint)
        return known or self._add(self._open(endpoint, b"kvq" + self._environment.random_bytes(16)))

    def _open(self, endpoint: str, identity: bytes) -> Connection:
        host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        if self._keys is None and not is_loopback(host):
            raise TransferError(
                "expected --kv-quant-transfer-keys for an address beyond loopback; make keys with: "
                "python -m sgl_kvq keys FOLDER"
            )
        socket = self._environment.make_socket(zmq.DEALER)
        monitor = None
        try:
            socket.setsockopt(zmq.ROUTING_ID, identity)
            socket.ipv6 = ":" in host
            if self._keys is not None:
                secure_client(socket, self._keys.keys())
            monitor = socket.get_monitor_socket(zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED)
            socket.connect(endpoint)
        except Exception:
            _close_sockets(socket, monitor)
            raise
        now = self._environment.now()
        return Connection(endpoint, identity, socket, monitor, now, now)

    def _add(self, connection: Connection) -> Connection:
        self.by_endpoint[connection.endpoint] = connection
        for readable in (connection.socket, connection.monitor):
            self.by_socket[readable] = connection
            self._environment.watch(readable)
        self.send_hello(connection)
        return connection

    def on_connected(self, connection: Connection, descriptor: int) -> None:
        """ZeroMQ has reached the prefill rank: limit what it may send."""
        connection.descriptor = descriptor
        limit = WELCOME_BYTES if connection.instance is None else self._stranger_bytes
        self._inbound.add(
            descriptor,
            int(connection.endpoint.rpartition(":")[2]),
            PROVEN_BYTES if connection.proven else limit,
            on_drop=lambda: self._on_flood(connection),
        )
        if connection.state is ConnectionState.CONNECTING:  # its Welcome may have been read before
            self._inbound.hold(descriptor)

    def release(self, connection: Connection) -> None:
        """The handshake is over: take as much at a time as comes."""
        limit = PROVEN_BYTES if connection.proven else self._stranger_bytes
        self._inbound.release(connection.descriptor, limit)

    def took(self, connection: Connection) -> None:
        """A message was taken and handled; it may have proven the prefill rank."""
        if not (connection.proven and self._inbound.prove(connection.descriptor, PROVEN_BYTES)):
            self._inbound.took(connection.descriptor)

    def close(self, connection: Connection) -> None:
        """End a connection."""
        del self.by_endpoint[connection.endpoint]
        for readable in (connection.socket, connection.monitor):
            del self.by_socket[readable]
            self._environment.unwatch(readable)
        self._inbound.forget(connection.descriptor)
        _close_sockets(connection.socket, connection.monitor)

    def reconnect(self, connection: Connection) -> None:
        """Replace a connection that broke, or is silent and may be out of step.

        Raises:
            KvqError: a key file is missing, as in `get_or_connect`; the connection stays as it was.
            zmq.ZMQError: no descriptors are left, say.
        """
        logger.debug("kvq-zmq: reconnecting to %s", connection.endpoint)
        fresh = self._open(connection.endpoint, connection.identity)
        self.close(connection)
        fresh.waiting, fresh.parts = connection.waiting, connection.parts
        fresh.reconnected_silent = connection.reconnected_silent or not connection.broken
        fresh.finished, fresh.last_finished = connection.finished, connection.last_finished
        fresh.blocks = connection.blocks
        fresh.instance, fresh.last_heard = connection.instance, connection.last_heard
        fresh.proven = connection.proven
        self._add(fresh)

    def send_hello(self, connection: Connection) -> None:
        """Begin the handshake."""
        connection.hello_sent = self._environment.now()
        self.send(connection, self._hello)

    def send(self, connection: Connection, message: Message) -> None:
        """Send a message; a lost one is made up for by later messages."""
        with suppress(zmq.ZMQError):
            connection.socket.send_multipart([CONTROL, pack_message(message)], zmq.NOBLOCK)


def _close_sockets(socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes] | None) -> None:
    if monitor is not None:
        socket.disable_monitor()
        monitor.close(linger=0)
    socket.close(linger=0)
