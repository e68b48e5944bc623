"""The decode side of the wire: one connection to each prefill rank, nothing listens."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import zmq
from zmq.utils.monitor import recv_monitor_message

from sgl_kvq.errors import ChecksumError, KvqError, TransferError, WireError
from sgl_kvq.memory_pool.page_io.cpu import PoolAccess
from sgl_kvq.transfer.blocks import HeadRange
from sgl_kvq.transfer.decode.assembly import InPart, InTransfer, Landing
from sgl_kvq.transfer.decode.connections import Links
from sgl_kvq.transfer.decode.link import Link, LinkState
from sgl_kvq.transfer.options import TransferConfig
from sgl_kvq.transfer.protocol.header import (
    HEADER_BYTES,
    MAX_BLOCKS,
    WIRE_VERSION,
    BlockHeader,
    BlockKind,
    parse_header,
)
from sgl_kvq.transfer.protocol.messages import (
    Abort,
    Ack,
    Alive,
    Done,
    Fingerprint,
    Hello,
    Message,
    Nack,
    Refuse,
    Welcome,
    parse_message,
)
from sgl_kvq.transfer.runtime.event_loop import BLOCK, CONTROL, TransferThread
from sgl_kvq.transfer.runtime.request_state import RequestState

logger = logging.getLogger(__name__)

MAX_FINISHED = 1024


class DecodeThread(TransferThread):
    """Receives blocks, verifies them and writes them to the pool.

    Args:
        config: The options.
        access: The pool of this rank.
        fingerprint: What the prefill instance must have in common.
        instance: Drawn by this process, uint64.
        on_success: Called with a transfer, under its ticket's lock, once all of it is written.
        on_link_down: Called with the endpoint of a connection that broke.
    """

    def __init__(
        self,
        config: TransferConfig,
        access: PoolAccess,
        fingerprint: Fingerprint,
        instance: int,
        on_success: Callable[[InTransfer], None] = lambda transfer: None,
        on_link_down: Callable[[str], None] = lambda endpoint: None,
    ) -> None:
        super().__init__("decode", config, access, fingerprint, instance)
        hello = Hello(WIRE_VERSION, instance, fingerprint)
        self._connections = Links(self.make_socket, self.poller, config, hello)
        self.links = self._connections.by_endpoint
        self._send = self._connections.send
        self._on_success, self._on_link_down = on_success, on_link_down
        self._retry_s = max(1.0, config.deadline_s / 6)

    # Called from the scheduler thread.

    def link_state(self, endpoint: str) -> tuple[LinkState, str]:
        """State of a connection, and why it was refused."""
        link = self.links.get(endpoint)
        return (link.state, link.reason) if link else (LinkState.CONNECTING, "")

    def announce(self, endpoints: list[str], room: int, nonce: int, ticket: RequestState) -> None:
        """A request has arrived that will be asked for at these prefill ranks."""
        self.post(lambda: self._announce(endpoints, room, nonce, ticket))

    def start_transfer(self, transfer: InTransfer, endpoints: list[str], peers: int) -> None:
        """Ask the prefill ranks for a transfer whose pages are allocated."""
        self.post(lambda: self._start(transfer, endpoints, peers))

    def close_room(
        self, endpoints: list[str], room: int, nonce: int, ticket: RequestState, reason: str | None
    ) -> None:
        """The request is over; with a reason, prefill ranks are told."""
        self.post(lambda: self._close_room(endpoints, room, nonce, ticket, reason))

    # Everything below runs in this thread.

    def _announce(self, endpoints: list[str], room: int, nonce: int, ticket: RequestState) -> None:
        for endpoint in endpoints:
            try:
                link = self._connections.get_or_connect(endpoint)
            except (KvqError, zmq.ZMQError, OSError) as error:
                ticket.fail(f"prefill instance at {endpoint}: {error}")
                return
            if room in link.parts or room in link.waiting:
                ticket.fail(f"room {room} is taken by another request; rooms must be unique")
                return
            link.waiting[room] = (nonce, ticket, time.monotonic())

    def _start(self, transfer: InTransfer, endpoints: list[str], peers: int) -> None:
        links = [self.links.get(endpoint) for endpoint in endpoints]
        for link in links:
            if link is None or transfer.room not in link.waiting:
                transfer.ticket.fail("the connection to the prefill instance is gone")
                return
        for link in filter(None, links):
            part = InPart(transfer, self.access, self.digest, peers)
            transfer.parts.append(part)
            del link.waiting[transfer.room]
            link.parts[transfer.room] = part
            if link.state is LinkState.READY:
                self._ask(link, part)

    def _ask(self, link: Link, part: InPart) -> None:
        part.heads = link.heads.intersect(self.access.heads)
        part.last_progress = time.monotonic()
        self._send(link, part.request())

    def _close_room(
        self, endpoints: list[str], room: int, nonce: int, ticket: RequestState, reason: str | None
    ) -> None:
        for endpoint in endpoints:
            link = self.links.get(endpoint)
            if link is None:
                continue
            part = link.parts.get(room)
            if room in link.waiting and link.waiting[room][1] is ticket:
                del link.waiting[room]
            elif part is not None and part.transfer.ticket is ticket:
                del link.parts[room]
                if part.said_done:
                    self._remember(link, room, nonce)
                    reason = None
            else:
                continue
            if reason is not None:
                self._send(link, Abort(room, nonce, reason[:1024]))

    def _remember(self, link: Link, room: int, nonce: int) -> None:
        link.finished[room] = nonce
        while len(link.finished) > MAX_FINISHED:
            del link.finished[next(iter(link.finished))]

    def _fail(self, transfer: InTransfer, reason: str) -> None:
        """End a transfer on this side and at every prefill rank."""
        if transfer.ticket.fail(reason):
            self.metrics.finished("failed")
            logger.debug("kvq-zmq: room %d failed: %s", transfer.room, reason)
        endpoints = list(self.links)
        self._close_room(endpoints, transfer.room, transfer.nonce, transfer.ticket, reason)

    def receive(self, socket: zmq.Socket[bytes]) -> None:
        """As the base, then acknowledge all blocks that are written together."""
        link = self._connections.by_socket.get(socket)
        if link is None:
            return
        if socket is link.monitor:
            recv_monitor_message(socket, zmq.NOBLOCK)
            self._on_disconnect(link)
            return
        super().receive(socket)
        self._settle_link(link)

    def _on_disconnect(self, link: Link) -> None:
        """The next tick connects anew: ZeroMQ itself gives up after a damaged stream."""
        if link.state is LinkState.READY:
            link.state = LinkState.CONNECTING
        self._on_link_down(link.endpoint)
        link.broken = True

    def on_frames(self, socket: zmq.Socket[bytes], frames: list[zmq.Frame]) -> None:
        """As the base: a control message or a block."""
        link = self._connections.by_socket[socket]
        link.last_heard = time.monotonic()
        kind = frames[0].bytes if frames else b""
        if kind == CONTROL and len(frames) == 2:
            self._on_message(link, parse_message(frames[1].buffer))
        elif kind == BLOCK and 3 <= len(frames) <= MAX_BLOCKS + 2:
            self._on_blocks(link, frames[1].buffer, [frame.buffer for frame in frames[2:]])
        else:
            raise WireError(f"expected a message or blocks, got {len(frames)} frames")

    def _on_blocks(self, link: Link, headers: memoryview, payloads: list[memoryview]) -> None:
        """Take those blocks of a message that make sense."""
        if len(headers) != HEADER_BYTES * len(payloads):
            raise WireError(f"{len(payloads)} blocks: got {len(headers)} bytes of headers")
        landings = []
        for place, payload in enumerate(payloads):
            try:
                header = parse_header(headers[place * HEADER_BYTES : (place + 1) * HEADER_BYTES])
                landings.append(self._on_block(link, header, payload))
            except KvqError as error:
                self.count_refused(error)
        link.landings += landings
        self.helpers.run([landing for landing in landings if not landing.done])

    def _on_block(self, link: Link, header: BlockHeader, payload: memoryview) -> Landing:
        part = link.parts.get(header.room)
        if part is None or part.transfer.nonce != header.nonce:
            raise WireError(f"block {header.seq}: no such transfer (room {header.room})")
        part.last_sign = link.last_heard
        return part.begin(header, payload)

    def settle(self) -> None:
        """As the base."""
        for link in self.links.values():
            self._settle_link(link)

    def _settle_link(self, link: Link) -> None:
        """Answer for blocks in order: the other side takes one that was left out for lost."""
        while link.landings and link.landings[0].done:
            landing = link.landings.popleft()
            part, header = landing.part, landing.header
            try:
                fresh = part.settle(landing)
            except ChecksumError:
                self.metrics.checksum_failures.inc()
                part.nacks.append(header.seq)
            except KvqError as error:
                self.count_refused(error)
            else:
                part.acks.append(header.seq)
                if fresh:
                    self._count(header)
        self._flush(link)

    def _count(self, header: BlockHeader) -> None:
        closed = header.kind is BlockKind.PAGES
        self.metrics.count_block(
            header.kind,
            header.wire_bytes,
            header.num_pages * header.num_layers * header.num_heads if closed else 0,
            self.access.num_layers * self.access.heads.count,
        )

    def _flush(self, link: Link) -> None:
        """Send what was gathered: damaged blocks first, then whole ones."""
        for part in list(link.parts.values()):
            room, nonce = part.transfer.room, part.transfer.nonce
            if part.nacks:
                self._send(link, Nack(room, nonce, part.nacks))
                part.nacks = []
            if part.acks:
                self._send(link, Ack(room, nonce, part.acks))
                part.acks = []
            if part.complete and not part.said_done:
                self._finish(link, part)

    def _finish(self, link: Link, part: InPart) -> None:
        transfer = part.transfer
        part.said_done = True
        self._send(link, Done(transfer.room, transfer.nonce))
        if not transfer.complete:
            return
        try:
            finished = transfer.ticket.finish(lambda: self._commit(transfer))
        except TransferError as error:
            self._fail(transfer, str(error))
            return
        if finished:
            self.metrics.finished("success")
            seconds = time.monotonic() - transfer.started
            self.metrics.observe("transferring", seconds)
            logger.debug(
                "kvq-zmq: room %d received: %d blocks, %d bytes, %d pages (%d were here), %.3f s",
                transfer.room,
                sum(len(part.received) for part in transfer.parts),
                sum(part.wire_bytes for part in transfer.parts),
                len(transfer.pages),
                transfer.prefix_pages,
                seconds,
            )

    def _commit(self, transfer: InTransfer) -> None:
        assert transfer.metadata is not None
        transfer.store_metadata(transfer.metadata)
        self._on_success(transfer)

    def _on_message(self, link: Link, message: Message) -> None:
        if isinstance(message, Welcome):
            self._on_welcome(link, message)
        elif isinstance(message, Refuse):
            self._on_refuse(link, message.reason)
        elif isinstance(message, Abort):
            part = link.parts.get(message.room)
            if part is not None and part.transfer.nonce == message.nonce:
                self._fail(part.transfer, f"prefill instance gave up: {message.reason}")
        elif isinstance(message, Alive):
            for room, nonce in message.rooms:
                part = link.parts.get(room)
                if part is not None and part.transfer.nonce == nonce:
                    self._on_alive(link, part)
                elif link.finished.get(room) == nonce:
                    self._send(link, Done(room, nonce))
        else:
            raise WireError(f"{type(message).__name__}: only decode instances send this")

    def _on_welcome(self, link: Link, welcome: Welcome) -> None:
        if welcome.wire_version != WIRE_VERSION:
            self._on_refuse(
                link, f"wire version: prefill {welcome.wire_version}, decode {WIRE_VERSION}"
            )
            return
        if link.instance not in (None, welcome.instance):
            for part in list(link.parts.values()):
                self._fail(part.transfer, "the prefill instance was restarted")
        link.instance = welcome.instance
        link.heads = HeadRange(welcome.first_head, welcome.first_head + welcome.num_heads)
        if link.state is LinkState.READY:
            return
        link.state = LinkState.READY
        for part in list(link.parts.values()):
            self._ask(link, part)

    def _on_refuse(self, link: Link, reason: str) -> None:
        link.state, link.reason = LinkState.REFUSED, reason
        for _, ticket, _ in link.waiting.values():
            ticket.fail(reason)
        for part in list(link.parts.values()):
            self._fail(part.transfer, reason)

    def _on_alive(self, link: Link, part: InPart) -> None:
        """The prefill rank works on it. Blocks sent before this message are here or lost."""
        now = time.monotonic()
        part.last_sign = now
        if part.said_done:
            self._send(link, Done(part.transfer.room, part.transfer.nonce))
        elif now - part.last_progress > self._retry_s:
            self._ask(link, part)

    def tick(self) -> None:
        """End transfers nobody has spoken of for too long; keep connections in shape."""
        now = time.monotonic()
        deadline_s = self.config.deadline_s
        for link in list(self.links.values()):
            self._expire(link, now)
            if not link.in_use:
                if link.state is not LinkState.READY or now - link.last_heard > deadline_s:
                    self._connections.close(link)
            elif link.broken or now - max(link.last_heard, link.opened) > deadline_s / 3:
                self._connections.reconnect(link)
            elif link.state is LinkState.CONNECTING and now - link.said_hello > 2.0:
                self._connections.say_hello(link)

    def send_alive(self) -> None:
        """As the base."""
        for link in self.links.values():
            rooms = [[room, nonce] for room, (nonce, _, _) in link.waiting.items()]
            rooms += [[room, part.transfer.nonce] for room, part in link.parts.items()]
            self._send(link, Alive(rooms))

    def _expire(self, link: Link, now: float) -> None:
        deadline_s = self.config.deadline_s
        for part in list(link.parts.values()):
            if not part.said_done and now - part.last_sign > deadline_s:
                self._fail(
                    part.transfer,
                    f"the prefill instance has been silent about this request for {deadline_s:g} s",
                )
        for room, (_, ticket, since) in list(link.waiting.items()):
            if (
                link.state is LinkState.CONNECTING
                and now - max(since, link.last_heard) > deadline_s
            ):
                ticket.fail(f"no prefill instance answers at {link.endpoint} ({deadline_s:g} s)")
            if ticket.over:
                del link.waiting[room]

    def close(self) -> None:
        """Fail every transfer and close the connections."""
        for link in list(self.links.values()):
            for _, ticket, _ in link.waiting.values():
                ticket.fail("the decode instance is shutting down")
            for part in list(link.parts.values()):
                self._fail(part.transfer, "the decode instance is shutting down")
            self._connections.close(link)
