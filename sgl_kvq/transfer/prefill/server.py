"""The prefill side of the wire: one listening socket, all decode ranks behind it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import zmq

from sgl_kvq.errors import ConfigError, TransferError, WireError
from sgl_kvq.memory_pool.page_io.cpu import PoolAccess
from sgl_kvq.transfer.blocks import Block
from sgl_kvq.transfer.options import TransferConfig
from sgl_kvq.transfer.prefill.buffers import SendBuffers
from sgl_kvq.transfer.prefill.rooms import MAX_ROOMS_A_PEER, MAX_TRIES, Outbound, OutRoom, Peer
from sgl_kvq.transfer.prefill.sender import Pump
from sgl_kvq.transfer.protocol.handshake import check_fingerprint
from sgl_kvq.transfer.protocol.header import WIRE_VERSION
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
    Request,
    Welcome,
    pack_message,
    parse_message,
)
from sgl_kvq.transfer.runtime.curve import secure_server
from sgl_kvq.transfer.runtime.event_loop import CONTROL, TransferThread
from sgl_kvq.transfer.runtime.request_state import RequestState

logger = logging.getLogger(__name__)

MAX_PEERS = 1024


class PrefillThread(TransferThread):
    """Sends blocks to every decode rank that asks, each within its own window.

    Args:
        config: The options.
        access: The pool of this rank.
        fingerprint: What a decode instance must have in common.
        instance: Drawn by this process, uint64.
        tp_rank: Added to a fixed port.
        on_asked: Called with (room, first request) once every decode rank has asked.
        on_sending: Called with the room when its first block leaves.
        on_success: Called with the room when every peer has everything.

    Raises:
        ConfigError: the address is taken or not ours, or a key file is missing.
    """

    def __init__(
        self,
        config: TransferConfig,
        access: PoolAccess,
        fingerprint: Fingerprint,
        instance: int,
        tp_rank: int = 0,
        on_asked: Callable[[int, Request], None] = lambda room, request: None,
        on_sending: Callable[[int], None] = lambda room: None,
        on_success: Callable[[int], None] = lambda room: None,
    ) -> None:
        super().__init__("prefill", config, access, fingerprint, instance)
        self.peers: dict[bytes, Peer] = {}
        self.rooms: dict[int, OutRoom] = {}
        self._on_asked, self._on_success = on_asked, on_success
        self.socket = self.make_socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._buffers = SendBuffers(access.new_buffer)
        self._pump = Pump(
            self.socket,
            access,
            self._buffers,
            self.helpers,
            config,
            self.digest,
            self.metrics,
            on_sending,
            self._fail,
        )
        self.socket.ipv6 = ":" in config.host
        self._authenticator = secure_server(self.socket, config.keys) if config.keys else None
        self.port = self._bind(tp_rank)
        self.poller.register(self.socket, zmq.POLLIN)

    def _bind(self, tp_rank: int) -> int:
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        port = self.config.port + tp_rank if self.config.port else 0
        try:
            if port:
                self.socket.bind(f"tcp://{host}:{port}")
                return port
            return int(self.socket.bind_to_random_port(f"tcp://{host}"))
        except zmq.ZMQError as error:
            self.close()
            self.context.destroy(linger=0)
            raise ConfigError(
                f"--kv-quant-transfer-host {host}: cannot listen on port {port or 'any'} ({error})"
            ) from error

    # Called from the scheduler thread.

    def open_room(self, room: int, ticket: RequestState) -> None:
        """A request has arrived; its transfer may begin when the decode instance asks."""
        self.post(lambda: self._open(room, ticket))

    def expect_pages(self, room: int, num_pages: int) -> None:
        """How many pages are going to be sent; the decode instance must expect as many."""
        self.post(lambda: self._expect(room, num_pages))

    def add_blocks(self, room: int, blocks: list[Block], is_last: bool) -> None:
        """These blocks can leave."""
        self.post(lambda: self._add(room, blocks, is_last))

    def close_room(self, room: int, ticket: RequestState, reason: str | None) -> None:
        """The request is over; with a reason, peers that wait for blocks are told."""
        self.post(lambda: self._close_room(room, ticket, reason))

    # Everything below runs in this thread.

    def _open(self, room: int, ticket: RequestState) -> None:
        out = self.rooms.setdefault(room, OutRoom(room))
        if out.ticket is not None and out.ticket is not ticket:
            ticket.fail(f"room {room} is taken by another request; rooms must be unique")
            return
        out.ticket = ticket
        out.opened = out.last_sign = time.monotonic()
        self._check_asked(out)

    def _expect(self, room: int, num_pages: int) -> None:
        out = self.rooms.get(room)
        if out is None or out.request is None:
            return
        out.num_pages = num_pages
        if out.request.num_pages != num_pages:
            self._fail(
                out,
                f"prefill sends {num_pages} pages, decode expects {out.request.num_pages}; the "
                f"prompts differ",
            )

    def _add(self, room: int, blocks: list[Block], is_last: bool) -> None:
        out = self.rooms.get(room)
        if out is not None:
            out.add_blocks(blocks, is_last)

    def _close_room(self, room: int, ticket: RequestState, reason: str | None) -> None:
        out = self.rooms.get(room)
        if out is None or out.ticket is not ticket:
            return
        self._drop(out, reason)

    def _drop(self, out: OutRoom, reason: str | None) -> None:
        del self.rooms[out.room]
        for outbound in out.outbounds.values():
            outbound.drop()
            if reason is not None and not outbound.done:
                self._tell(outbound.peer, Abort(out.room, outbound.nonce, reason[:1024]))

    def _fail(self, out: OutRoom, reason: str) -> None:
        """End a room that cannot succeed, on both sides."""
        if self.rooms.get(out.room) is not out:
            return
        if out.ticket is not None and out.ticket.fail(reason):
            self.metrics.finished("failed")
            logger.debug("kvq-zmq: room %d failed: %s", out.room, reason)
        self._drop(out, reason)

    def on_frames(self, socket: zmq.Socket[bytes], frames: list[zmq.Frame]) -> None:
        """As the base: a control message of any peer."""
        identity, *rest = frames
        if len(rest) != 2 or rest[0].bytes != CONTROL:
            raise WireError(f"expected a control message, got {len(rest)} frames")
        self._on_message(identity.bytes, parse_message(rest[1].buffer))

    def _on_message(self, identity: bytes, message: Message) -> None:
        if isinstance(message, Hello):
            self._on_hello(identity, message)
            return
        peer = self.peers.get(identity)
        if peer is None:
            raise TransferError(f"{type(message).__name__} before Hello")
        peer.reachable = True
        peer.last_heard = time.monotonic()
        if isinstance(message, Request):
            self._on_request(peer, message)
        elif isinstance(message, Alive):
            self._on_alive(peer, message)
        elif isinstance(message, Ack | Nack | Done | Abort):
            out = self.rooms.get(message.room)
            outbound = out.outbounds.get(identity) if out else None
            if out is None or outbound is None or outbound.nonce != message.nonce:
                return  # of another transfer, or of one that is over
            out.last_sign = time.monotonic()
            self._on_progress(out, outbound, message)

    def _on_hello(self, identity: bytes, hello: Hello) -> None:
        try:
            if hello.wire_version != WIRE_VERSION:
                raise TransferError(
                    f"wire version: prefill {WIRE_VERSION}, decode {hello.wire_version}; install "
                    f"the same sgl_kvq on both instances"
                )
            check_fingerprint(self.fingerprint, hello.fingerprint)
            if identity not in self.peers and len(self.peers) >= MAX_PEERS:
                raise TransferError(f"{MAX_PEERS} decode ranks are connected already")
        except TransferError as error:
            self._send(identity, Refuse(str(error)[:4000]))
            return
        known = self.peers.get(identity)
        if known is None or known.instance != hello.instance:
            self.peers[identity] = Peer(identity, hello.instance)
        else:
            known.reachable = True
            known.last_heard = time.monotonic()
        heads = self.access.heads
        self._send(identity, Welcome(WIRE_VERSION, self.instance, heads.first, heads.count))

    def _on_request(self, peer: Peer, request: Request) -> None:
        out = self.rooms.get(request.room)
        outbound = out.outbounds.get(peer.identity) if out else None
        if out is not None and outbound is not None and outbound.nonce == request.nonce:
            out.last_sign = time.monotonic()
            outbound.resume(request.have)
            return
        reason = self._refusal(peer, out, outbound, request)
        if reason is not None:
            self._tell(peer, Abort(request.room, request.nonce, reason))
            return
        if out is None:
            out = self.rooms[request.room] = OutRoom(request.room)
        out.request = out.request or request
        out.outbounds[peer.identity] = Outbound(out, peer, request, self._buffers)
        out.last_sign = time.monotonic()
        self._check_asked(out)

    def _refusal(
        self, peer: Peer, out: OutRoom | None, outbound: Outbound | None, request: Request
    ) -> str | None:
        """Why a first request cannot be served; None if it can."""
        heads, mine = request.first_head, self.access.heads
        if request.num_heads == 0 or not (
            mine.first <= heads and heads + request.num_heads <= mine.end
        ):
            return (
                f"KV heads {heads} to {heads + request.num_heads}: this rank holds "
                f"{mine.first} to {mine.end}"
            )
        if outbound is not None:
            return "this room is asked for twice by one peer"
        if out is None:
            rooms = sum(peer.identity in other.outbounds for other in self.rooms.values())
            return "too many rooms at once" if rooms >= MAX_ROOMS_A_PEER else None
        return out.refusal(request)

    def _check_asked(self, out: OutRoom) -> None:
        ticket, request = out.ticket, out.request
        if ticket is not None and request is not None and out.all_asked:
            self.metrics.observe("bootstrapping", time.monotonic() - out.opened)
            ticket.advance(lambda: self._on_asked(out.room, request))

    def _on_alive(self, peer: Peer, alive: Alive) -> None:
        for room, nonce in alive.rooms:
            out = self.rooms.get(room)
            if out is None:
                continue
            outbound = out.outbounds.get(peer.identity)
            if out.request is None or (outbound is not None and outbound.nonce == nonce):
                out.last_sign = time.monotonic()

    def _on_progress(
        self, out: OutRoom, outbound: Outbound, message: Ack | Nack | Done | Abort
    ) -> None:
        if isinstance(message, Abort):
            self._fail(out, f"decode instance gave up: {message.reason}")
        elif isinstance(message, Nack):
            self.metrics.checksum_failures.inc(len(message.seqs))
            self._count_retries(out, outbound, outbound.send_again(message.seqs))
        elif isinstance(message, Ack):
            self._count_retries(out, outbound, outbound.acknowledge(message.seqs))
        elif out.complete:
            outbound.done = True
            outbound.drop()
            if out.all_done and out.ticket is not None:
                out.ticket.finish(lambda: self._on_success(out.room))
                self._report(out)
                self._drop(out, None)

    def _report(self, out: OutRoom) -> None:
        self.metrics.finished("success")
        seconds = time.monotonic() - out.opened
        self.metrics.observe("transferring", seconds)
        self.metrics.early_bytes.inc(out.early_bytes)
        logger.debug(
            "kvq-zmq: room %d sent: %d blocks, %d bytes (%d before prefill ended), %.3f s from "
            "arrival, %d peers",
            out.room,
            len(out.blocks),
            out.bytes_sent,
            out.early_bytes,
            seconds,
            len(out.outbounds),
        )

    def _count_retries(self, out: OutRoom, outbound: Outbound, seqs: list[int]) -> None:
        self.metrics.retries.inc(len(seqs))
        worn_out = [seq for seq in seqs if outbound.tries.get(seq, 0) >= MAX_TRIES]
        if worn_out:
            self._fail(out, f"block {worn_out[0]} did not arrive whole in {MAX_TRIES} tries")

    def work(self) -> bool:
        """Send a few blocks."""
        return self._pump.send_some(self.peers.values())

    def settle(self) -> None:
        """As the base."""
        for peer in self.peers.values():
            self._pump.send_read(peer)

    def _tell(self, peer: Peer, message: Message) -> None:
        if peer.reachable:
            self._send(peer.identity, message)

    def _send(self, identity: bytes, message: Message) -> None:
        try:
            self.socket.send_multipart([identity, CONTROL, pack_message(message)], zmq.NOBLOCK)
        except zmq.ZMQError:
            if identity in self.peers:
                self.peers[identity].reachable = False

    def tick(self) -> None:
        """End rooms nobody has spoken of for too long, forget peers that are gone."""
        now = time.monotonic()
        deadline_s = self.config.deadline_s
        for out in list(self.rooms.values()):
            if now - out.last_sign > deadline_s:
                self._fail(out, self._silence(out))
        for peer in list(self.peers.values()):
            used = any(peer.identity in out.outbounds for out in self.rooms.values())
            if not used and now - peer.last_heard > 4 * deadline_s:
                del self.peers[peer.identity]

    def _silence(self, out: OutRoom) -> str:
        seconds = f"{self.config.deadline_s:g} s"
        if out.ticket is None:
            return f"this request did not reach the prefill instance within {seconds}"
        if out.request is None:
            return f"no decode instance asked for this request within {seconds}"
        return f"the decode instance has been silent about this request for {seconds}"

    def send_alive(self) -> None:
        """As the base."""
        rooms: dict[bytes, list[list[int]]] = {}
        for out in self.rooms.values():
            if out.ticket is None or out.ticket.over:
                continue
            for identity, outbound in out.outbounds.items():
                if not outbound.done:
                    rooms.setdefault(identity, []).append([out.room, outbound.nonce])
        for identity, peer in self.peers.items():
            self._tell(peer, Alive(rooms.get(identity, [])))

    def close(self) -> None:
        """Fail every room and stop listening."""
        for out in list(self.rooms.values()) if hasattr(self, "rooms") else []:
            self._fail(out, "the prefill instance is shutting down")
        self.socket.close(linger=200)
        if self._authenticator is not None:
            self._authenticator.stop()
