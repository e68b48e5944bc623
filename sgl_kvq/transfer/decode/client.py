"""The decode side of the wire: one connection to each prefill rank, no listening socket."""

from __future__ import annotations

import logging
from collections.abc import Callable

import zmq
from typing_extensions import override
from zmq.utils.monitor import recv_monitor_message

from sgl_kvq.errors import KvqError, TransferError, WireError
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.memory_pool.page_io.span import HeadRange
from sgl_kvq.transfer.codecs.registry import decodable
from sgl_kvq.transfer.decode.assembly import IncomingPart, IncomingTransfer
from sgl_kvq.transfer.decode.connections import Connection, Connections, ConnectionState
from sgl_kvq.transfer.decode.receiver import BlockReceiver
from sgl_kvq.transfer.decode.sources import Source
from sgl_kvq.transfer.protocol.header import MAX_BLOCKS, WIRE_VERSION
from sgl_kvq.transfer.protocol.messages import (
    Abort,
    Alive,
    Done,
    Hello,
    Message,
    OtherVersion,
    Refuse,
    Welcome,
    alive_messages,
    parse_message,
)
from sgl_kvq.transfer.runtime.environment import Environment
from sgl_kvq.transfer.runtime.event_loop import BLOCK, CONTROL, TransferThread
from sgl_kvq.transfer.runtime.rank import Rank
from sgl_kvq.transfer.runtime.request_state import RequestState

logger = logging.getLogger(__name__)

MAX_FINISHED = 1024
HELLO_INTERVAL_S = 2.0
STRANGER_BYTES = 3 * 2**16
"""What a prefill rank may send at once before its first block, apart from that: messages that wait
and a first window."""


class DecodeThread(TransferThread):
    """Receives blocks, verifies them and writes them to the pool.

    Args:
        rank: What this rank is.
        on_success: Called with a transfer, under its state's lock, once all of it is written.
        on_disconnect: Called with the endpoint of a connection that broke.
        environment: Time, sockets and threads; None for the real ones.
    """

    def __init__(
        self,
        rank: Rank,
        on_success: Callable[[IncomingTransfer], None] = lambda transfer: None,
        on_disconnect: Callable[[str], None] = lambda endpoint: None,
        environment: Environment | None = None,
    ) -> None:
        super().__init__("decode", rank, environment)
        hello = Hello(WIRE_VERSION, rank.instance, rank.fingerprint, decodable())
        stranger_bytes = STRANGER_BYTES + PAGE_SIZE * rank.access.row_bytes(rank.access.heads)
        self._connections = Connections(
            self.environment, rank.config, hello, stranger_bytes, self._on_flood
        )
        self.connections = self._connections.by_endpoint
        self._send = self._connections.send
        self._receiver = BlockReceiver(
            rank.access,
            self.workers,
            self.metrics,
            self.now,
            self._send,
            self.count_refused,
            self._fail,
            on_success,
        )
        self._report_disconnect = on_disconnect
        self._retry_s = max(1.0, self.config.deadline_s / 6)

    # Called from the scheduler thread.

    def connection_state(self, endpoint: str) -> tuple[ConnectionState, str]:
        """State of a connection, and why it was refused."""
        connection = self.connections.get(endpoint)
        if connection is None:
            return ConnectionState.CONNECTING, ""
        return connection.state, connection.reason

    def announce(self, endpoints: list[str], room: int, nonce: int, state: RequestState) -> None:
        """A request has arrived; its pages will be requested from these prefill ranks."""
        self.post(lambda: self._announce(endpoints, room, nonce, state))

    def start_transfer(self, transfer: IncomingTransfer, endpoints: list[str], peers: int) -> None:
        """Request a transfer whose pages are allocated from the prefill ranks."""
        self.post(lambda: self._start(transfer, endpoints, peers))

    def close_room(
        self, endpoints: list[str], room: int, nonce: int, state: RequestState, reason: str | None
    ) -> None:
        """The request is over; with a reason, prefill ranks are told."""
        self.post(lambda: self._close_room(endpoints, room, nonce, state, reason))

    # Everything below runs in this thread.

    def _announce(self, endpoints: list[str], room: int, nonce: int, state: RequestState) -> None:
        if not endpoints:
            state.fail(
                "expected at least one prefill rank; check what the bootstrap server was told"
            )
        for endpoint in endpoints:
            try:
                connection = self._connections.get_or_connect(endpoint)
            except (KvqError, zmq.ZMQError, OSError) as error:
                state.fail(f"prefill instance at {endpoint}: {error}")
                return
            if room in connection.parts or room in connection.waiting:
                state.fail(f"room {room} is taken by another request; rooms must be unique")
                return
            connection.waiting[room] = (nonce, state, self.now())

    def _start(self, transfer: IncomingTransfer, endpoints: list[str], peers: int) -> None:
        connections = [self.connections.get(endpoint) for endpoint in endpoints]
        for connection in connections:
            if connection is None or transfer.room not in connection.waiting:
                transfer.state.fail("the connection to the prefill instance is gone")
                return
        transfer.started = self.now()
        for connection in filter(None, connections):
            part = IncomingPart(transfer, self.access, self.digest, peers, transfer.started)
            transfer.parts.append(part)
            del connection.waiting[transfer.room]
            connection.parts[transfer.room] = part
        for connection, part in zip(filter(None, connections), transfer.parts, strict=True):
            if connection.state is ConnectionState.READY and not transfer.state.over:
                self._request(connection, part)

    def _request(self, connection: Connection, part: IncomingPart) -> None:
        assert connection.instance is not None  # it is READY
        heads = connection.heads.intersect(self.access.heads)
        try:
            part.set_source(Source(connection.endpoint, connection.instance, heads))
            part.transfer.check_sources(self.access.heads)
        except TransferError as error:
            self._fail(part.transfer, str(error))
            return
        part.last_progress = part.requested = self.now()
        self._send(connection, part.request())

    def _close_room(
        self, endpoints: list[str], room: int, nonce: int, state: RequestState, reason: str | None
    ) -> None:
        for endpoint in endpoints:
            connection = self.connections.get(endpoint)
            if connection is None:
                continue
            part = connection.parts.get(room)
            if room in connection.waiting and connection.waiting[room][1] is state:
                del connection.waiting[room]
            elif part is not None and part.transfer.state is state:
                del connection.parts[room]
                if part.done_sent:
                    self._remember(connection, room, nonce)
                    reason = None
            else:
                continue
            if reason is not None:
                self._send(connection, Abort(room, nonce, reason[:1024]))

    def _remember(self, connection: Connection, room: int, nonce: int) -> None:
        connection.finished[room], connection.last_finished = nonce, self.now()
        while len(connection.finished) > MAX_FINISHED:
            del connection.finished[next(iter(connection.finished))]

    def _fail(self, transfer: IncomingTransfer, reason: str) -> None:
        """End a transfer on this side and at every prefill rank."""
        if transfer.state.fail(reason):
            self.metrics.finished("failed")
            logger.debug("kvq-zmq: room %d failed: %s", transfer.room, reason)
        endpoints = list(self.connections)
        self._close_room(endpoints, transfer.room, transfer.nonce, transfer.state, reason)

    @override
    def receive(self, socket: zmq.Socket[bytes]) -> None:
        connection = self._connections.by_socket.get(socket)
        if connection is None:
            return
        if socket is connection.monitor:
            event = recv_monitor_message(socket, zmq.NOBLOCK)
            if event["event"] == zmq.EVENT_CONNECTED:
                self._connections.on_connected(connection, event["value"])
            else:
                self._on_disconnect(connection)
            return
        super().receive(socket)
        self._answer(connection)

    def _answer(self, connection: Connection) -> None:
        """Answer blocks that are written; resume rooms once those before the Welcome are."""
        self._receiver.answer(connection)
        welcomed = connection.state is ConnectionState.WELCOMED
        if welcomed and connection.last_block not in connection.blocks:
            connection.state, connection.last_block = ConnectionState.READY, None
            for part in list(connection.parts.values()):
                self._request(connection, part)

    def _on_flood(self, connection: Connection) -> None:
        reason = f"the instance at {connection.endpoint} sent more than it was asked for"
        self.post(lambda: self._on_refuse(connection, reason))

    def _on_disconnect(self, connection: Connection) -> None:
        """Have the next tick reconnect: ZeroMQ itself gives up after a damaged stream."""
        if connection.state is not ConnectionState.REFUSED:
            connection.state = ConnectionState.CONNECTING
        self._report_disconnect(connection.endpoint)
        connection.broken = True

    @override
    def on_frames(self, socket: zmq.Socket[bytes], frames: list[zmq.Frame]) -> None:
        connection = self._connections.by_socket[socket]
        now = self.now()
        slow = now - connection.last_heard > self.config.deadline_s / 6
        connection.last_heard = now
        try:
            self._on_frames(connection, frames, slow)
        except KvqError:
            connection.damaged = connection.last_heard  # it may have been blocks
            raise
        finally:
            self._connections.took(connection)

    def _on_frames(self, connection: Connection, frames: list[zmq.Frame], slow: bool) -> None:
        kind = frames[0].bytes if frames else b""
        if kind == CONTROL and len(frames) == 2:
            self._on_message(connection, parse_message(frames[1].buffer))
        elif kind == BLOCK and 3 <= len(frames) <= MAX_BLOCKS + 2:
            connection.reconnected_silent &= slow
            payloads = [frame.buffer for frame in frames[2:]]
            self._receiver.take(connection, frames[1].buffer, payloads)
        else:
            raise WireError(f"expected a message or blocks, got {len(frames)} frames")

    @override
    def take_results(self) -> None:
        for connection in self.connections.values():
            self._answer(connection)

    def _on_message(self, connection: Connection, message: Message | OtherVersion) -> None:
        if isinstance(message, OtherVersion):
            reason = f"wire version: prefill {message.wire_version}, decode {WIRE_VERSION}"
            self._on_refuse(connection, reason)
        elif isinstance(message, Welcome):
            self._on_welcome(connection, message)
        elif isinstance(message, Refuse):
            self._on_refuse(connection, message.reason)
        elif isinstance(message, Abort):
            part = connection.parts.get(message.room)
            if part is not None and part.transfer.nonce == message.nonce:
                self._fail(part.transfer, f"prefill instance gave up: {message.reason}")
        elif isinstance(message, Alive):
            for room, nonce in message.rooms:
                part = connection.parts.get(room)
                if part is not None and part.transfer.nonce == nonce:
                    self._on_alive(connection, part)
                elif connection.finished.get(room) == nonce:
                    self._send(connection, Done(room, nonce))
        else:
            raise WireError(f"{type(message).__name__}: only decode instances send this")

    def _on_welcome(self, connection: Connection, welcome: Welcome) -> None:
        if connection.instance not in (None, welcome.instance):
            for part in list(connection.parts.values()):
                self._fail(part.transfer, "the prefill instance was restarted")
        connection.instance = welcome.instance
        connection.heads = HeadRange(welcome.first_head, welcome.first_head + welcome.num_heads)
        if connection.state in (ConnectionState.WELCOMED, ConnectionState.READY):
            return
        self._connections.release(connection)
        connection.state = ConnectionState.WELCOMED
        connection.last_block = connection.blocks[-1] if connection.blocks else None

    def _on_refuse(self, connection: Connection, reason: str) -> None:
        connection.state, connection.reason = ConnectionState.REFUSED, reason
        self._fail_rooms(connection, reason)

    def _fail_rooms(self, connection: Connection, reason: str) -> None:
        for _, state, _ in connection.waiting.values():
            state.fail(reason)
        connection.waiting.clear()
        for part in list(connection.parts.values()):
            self._fail(part.transfer, reason)

    def _on_alive(self, connection: Connection, part: IncomingPart) -> None:
        """The prefill rank works on the part, though a damaged header may have hidden a block."""
        now = self.now()
        part.last_heard = now
        if part.done_sent:
            self._send(connection, Done(part.transfer.room, part.transfer.nonce))
        elif part.requested < connection.damaged and now - part.last_progress > self._retry_s:
            self._request(connection, part)

    @override
    def tick(self) -> None:
        """Expire idle transfers; reconnect or close unhealthy connections.

        For a deadline after a success, a prefill rank may still ask whether everything has arrived.
        """
        self.environment.inbound.sweep()
        now = self.now()
        deadline_s = self.config.deadline_s
        for connection in list(self.connections.values()):
            self._expire(connection, now)
            state = connection.state
            silent_s = now - max(connection.last_heard, connection.opened)
            no_answer = state is ConnectionState.CONNECTING
            asked_for = now - connection.last_finished <= deadline_s
            if not connection.in_use and not asked_for:
                if state is not ConnectionState.READY or silent_s > deadline_s:
                    self._connections.close(connection)
            elif connection.broken or silent_s > deadline_s * connection.patience:
                self._reconnect(connection)
            elif no_answer and now - connection.hello_sent > HELLO_INTERVAL_S:
                self._connections.send_hello(connection)

    def _reconnect(self, connection: Connection) -> None:
        try:
            self._connections.reconnect(connection)
        except (KvqError, zmq.ZMQError, OSError) as error:
            reason = f"cannot connect again to {connection.endpoint}: {error}"
            self._fail_rooms(connection, reason)
            self._connections.close(connection)

    @override
    def send_alive(self) -> None:
        for connection in self.connections.values():
            if connection.state is not ConnectionState.READY:
                continue
            rooms = [[room, nonce] for room, (nonce, _, _) in connection.waiting.items()]
            rooms += [[room, part.transfer.nonce] for room, part in connection.parts.items()]
            for message in alive_messages(rooms):
                self._send(connection, message)

    def _expire(self, connection: Connection, now: float) -> None:
        deadline_s = self.config.deadline_s
        for part in list(connection.parts.values()):
            if not part.done_sent and now - part.last_heard > deadline_s:
                self._fail(
                    part.transfer,
                    f"the prefill instance has been silent about this request for {deadline_s:g} s",
                )
        connecting = connection.state is ConnectionState.CONNECTING
        for room, (_, state, since) in list(connection.waiting.items()):
            if connecting and now - max(since, connection.last_heard) > deadline_s:
                endpoint = connection.endpoint
                state.fail(f"no prefill instance answers at {endpoint} ({deadline_s:g} s)")
            if state.over:
                del connection.waiting[room]

    @override
    def close(self) -> None:
        """Fail every transfer and close the connections."""
        for connection in list(self.connections.values()):
            self._fail_rooms(connection, "the decode instance is shutting down")
            self._connections.close(connection)
