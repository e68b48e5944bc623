"""The prefill side of the wire: one listening socket, all decode ranks behind it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import zmq
from typing_extensions import override

from sgl_kvq.errors import TransferError, WireError
from sgl_kvq.transfer.blocks import Block
from sgl_kvq.transfer.codecs.registry import get_codec
from sgl_kvq.transfer.prefill.buffers import SendBuffers
from sgl_kvq.transfer.prefill.listener import Listener
from sgl_kvq.transfer.prefill.rooms import (
    MAX_ROOMS_PER_PEER,
    MAX_TRIES,
    OutgoingPart,
    OutgoingTransfer,
    Peer,
)
from sgl_kvq.transfer.prefill.sender import BlockSender, ReadContext
from sgl_kvq.transfer.protocol.header import WIRE_VERSION
from sgl_kvq.transfer.protocol.messages import (
    Abort,
    Ack,
    Alive,
    Done,
    Hello,
    Message,
    Nack,
    OtherVersion,
    Request,
    alive_messages,
    parse_message,
)
from sgl_kvq.transfer.protocol.prompt import Prompt
from sgl_kvq.transfer.runtime.environment import Environment
from sgl_kvq.transfer.runtime.event_loop import CONTROL, TransferThread
from sgl_kvq.transfer.runtime.rank import Rank
from sgl_kvq.transfer.runtime.request_state import RequestState

logger = logging.getLogger(__name__)

MAX_REFUSED = 1024


class PrefillThread(TransferThread):
    """Sends blocks to every decode rank that requests them, each within its own window.

    Args:
        rank: What this rank is.
        tp_rank: Added to a fixed port.
        on_requested: Called with (room, first request) once every decode rank sent its request.
        on_sending: Called with the room when its first block leaves.
        on_success: Called with the room when every peer has everything.
        environment: Time, sockets and threads; None for the real ones.

    Raises:
        ConfigError: the address is taken or not ours, or a key file is missing.
    """

    def __init__(
        self,
        rank: Rank,
        tp_rank: int = 0,
        on_requested: Callable[[int, Request], None] = lambda room, request: None,
        on_sending: Callable[[int], None] = lambda room: None,
        on_success: Callable[[int], None] = lambda room: None,
        environment: Environment | None = None,
    ) -> None:
        super().__init__("prefill", rank, environment)
        self.rooms: dict[int, OutgoingTransfer] = {}
        self._refused: dict[int, tuple[str, float]] = {}
        self._on_requested, self._on_success = on_requested, on_success
        self._listener = Listener(rank, self.environment, tp_rank)
        self.port, self.peers = self._listener.port, self._listener.peers
        self._tell = self._listener.tell
        self._buffers = SendBuffers(rank.access.new_buffer)
        codec = get_codec(rank.config.codec)
        self._sender = BlockSender(
            self._listener.socket,
            ReadContext(rank.access, codec, self._buffers, self.digest),
            self.workers,
            self.metrics,
            self.now,
            on_sending,
            self._fail,
        )

    # Called from the scheduler thread.

    def open_room(self, room: int, state: RequestState, prompt: Prompt) -> None:
        """A request has arrived; its transfer begins with the decode instance's request."""
        self.post(lambda: self._open(room, state, prompt))

    def refuse_room(self, room: int, reason: str) -> None:
        """A further request with a room was refused; whoever asks for it later is told."""
        self.post(lambda: self._refuse(room, reason))

    def expect_pages(self, room: int, num_pages: int) -> None:
        """How many pages are going to be sent; the decode instance must expect as many."""
        self.post(lambda: self._expect(room, num_pages))

    def block_bytes(self, room: int) -> int:
        """Size to fill blocks up to, small for a slow link."""
        transfer = self.rooms.get(room)
        parts = list(transfer.parts.values()) if transfer else []
        return min((part.peer.pace.block_bytes for part in parts), default=self.config.block_bytes)

    def add_blocks(self, room: int, blocks: list[Block], is_last: bool) -> None:
        """These blocks can leave."""
        self.post(lambda: self._add(room, blocks, is_last))

    def close_room(self, room: int, state: RequestState, reason: str | None) -> None:
        """The request is over; with a reason, peers that wait for blocks are told."""
        self.post(lambda: self._close_room(room, state, reason))

    # Everything below runs in this thread.

    def _open(self, room: int, state: RequestState, prompt: Prompt) -> None:
        transfer = self.rooms.setdefault(room, OutgoingTransfer(room, self.now()))
        if transfer.state is not None and transfer.state is not state:
            state.fail(f"room {room} is taken by another request; rooms must be unique")
            return
        transfer.state, transfer.prompt = state, prompt
        self._refused.pop(room, None)
        transfer.opened = transfer.last_heard = self.now()
        self._check_requested(transfer)

    def _refuse(self, room: int, reason: str) -> None:
        self._refused[room] = (reason, self.now())
        while len(self._refused) > MAX_REFUSED:
            del self._refused[next(iter(self._refused))]
        transfer = self.rooms.get(room)
        if transfer is not None and transfer.state is None:  # it was asked for already
            self._fail(transfer, reason)

    def _expect(self, room: int, num_pages: int) -> None:
        transfer = self.rooms.get(room)
        if transfer is None or transfer.request is None:
            return
        transfer.num_pages = num_pages
        if transfer.request.num_pages != num_pages:
            self._fail(
                transfer,
                f"prefill sends {num_pages} pages, decode expects {transfer.request.num_pages}; "
                f"the prompts differ",
            )

    def _add(self, room: int, blocks: list[Block], is_last: bool) -> None:
        transfer = self.rooms.get(room)
        if transfer is not None:
            transfer.add_blocks(blocks, is_last)

    def _close_room(self, room: int, state: RequestState, reason: str | None) -> None:
        transfer = self.rooms.get(room)
        if transfer is not None and transfer.state is state:
            self._drop(transfer, reason)

    def _drop(self, transfer: OutgoingTransfer, reason: str | None) -> None:
        del self.rooms[transfer.room]
        for part in transfer.parts.values():
            part.drop()
            if reason is not None and not part.done:
                self._tell(part.peer, Abort(transfer.room, part.nonce, reason[:1024]))

    def _fail(self, transfer: OutgoingTransfer, reason: str) -> None:
        """End a transfer that cannot succeed, on both sides."""
        if self.rooms.get(transfer.room) is not transfer:
            return
        if transfer.state is not None and transfer.state.fail(reason):
            self.metrics.finished("failed")
            logger.debug("kvq-zmq: room %d failed: %s", transfer.room, reason)
        self._drop(transfer, reason)

    @override
    def receive(self, socket: zmq.Socket[bytes]) -> None:
        if socket is self._listener.monitor:
            self._listener.on_events()
        else:
            super().receive(socket)

    @override
    def on_frames(self, socket: zmq.Socket[bytes], frames: list[zmq.Frame]) -> None:
        identity, *rest = frames
        try:
            if len(rest) != 2 or rest[0].bytes != CONTROL:
                raise WireError(f"expected a control message, got {len(rest)} frames")
            self._on_message(identity.bytes, parse_message(rest[1].buffer))
        finally:
            self._listener.took(identity.bytes, frames[-1])

    def _on_message(self, identity: bytes, message: Message | OtherVersion) -> None:
        if isinstance(message, OtherVersion):
            reason = (
                f"wire version: prefill {WIRE_VERSION}, decode {message.wire_version}; install the "
                f"same sgl_kvq on both instances"
            )
            self._listener.refuse(identity, reason)
            return
        if isinstance(message, Hello):
            self._listener.on_hello(identity, message)
            return
        peer = self.peers.get(identity)
        if peer is None:
            raise TransferError(f"{type(message).__name__} before Hello")
        peer.reachable = True
        peer.last_heard = self.now()
        if isinstance(message, Request):
            self._on_request(peer, message)
        elif isinstance(message, Alive):
            self._on_alive(peer, message)
        elif isinstance(message, Ack | Nack | Done | Abort):
            transfer = self.rooms.get(message.room)
            part = transfer.parts.get(identity) if transfer else None
            if transfer is None or part is None or part.nonce != message.nonce:
                return  # another transfer of the room, or one that is over
            transfer.last_heard = self.now()
            self._on_progress(transfer, part, message)

    def _on_request(self, peer: Peer, request: Request) -> None:
        transfer = self.rooms.get(request.room)
        part = transfer.parts.get(peer.identity) if transfer else None
        if transfer is not None and part is not None and part.nonce == request.nonce:
            transfer.last_heard = self.now()
            part.resume(request.have)
            return
        reason = self._refusal(peer, transfer, part, request)
        if reason is not None:
            self._tell(peer, Abort(request.room, request.nonce, reason))
            return
        if transfer is None:
            transfer = self.rooms[request.room] = OutgoingTransfer(request.room, self.now())
        transfer.request = transfer.request or replace(request, have=[])
        transfer.parts[peer.identity] = OutgoingPart(transfer, peer, request, self._buffers)
        transfer.last_heard = self.now()
        self._check_requested(transfer)

    def _refusal(
        self,
        peer: Peer,
        transfer: OutgoingTransfer | None,
        part: OutgoingPart | None,
        request: Request,
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
        if part is not None:
            return "this peer requested the room already"
        if transfer is None:
            if request.room in self._refused:
                return self._refused[request.room][0]
            return "too many rooms at once" if len(peer.parts) >= MAX_ROOMS_PER_PEER else None
        return transfer.refusal(request)

    def _check_requested(self, transfer: OutgoingTransfer) -> None:
        try:
            transfer.check_prompt()
        except TransferError as error:
            self._fail(transfer, str(error))
            return
        state, request = transfer.state, transfer.request
        if state is not None and request is not None and transfer.all_requested:
            self.metrics.observe("bootstrapping", self.now() - transfer.opened)
            state.advance(lambda: self._on_requested(transfer.room, request))

    def _on_alive(self, peer: Peer, alive: Alive) -> None:
        for room, nonce in alive.rooms:
            transfer = self.rooms.get(room)
            if transfer is None:
                continue
            part = transfer.parts.get(peer.identity)
            if transfer.request is None or (part is not None and part.nonce == nonce):
                transfer.last_heard = self.now()

    def _on_progress(
        self, transfer: OutgoingTransfer, part: OutgoingPart, message: Ack | Nack | Done | Abort
    ) -> None:
        if isinstance(message, Abort):
            self._fail(transfer, f"decode instance gave up: {message.reason}")
        elif isinstance(message, Nack):
            self.metrics.checksum_failures.inc(len(message.seqs))
            self._count_retries(transfer, part, part.retransmit(message.seqs))
        elif isinstance(message, Ack):
            self._count_retries(transfer, part, part.acknowledge(message.seqs, self.now()))
        elif transfer.complete:
            part.done = True
            part.drop()
            if transfer.all_done and transfer.state is not None:
                transfer.state.finish(lambda: self._on_success(transfer.room))
                self._report(transfer)
                self._drop(transfer, None)

    def _report(self, transfer: OutgoingTransfer) -> None:
        self.metrics.finished("success")
        seconds = self.now() - transfer.opened
        self.metrics.observe("transferring", seconds)
        self.metrics.early_bytes.inc(transfer.early_bytes)
        logger.debug(
            "kvq-zmq: room %d sent: %d blocks, %d bytes (%d before prefill ended), %.3f s from "
            "arrival, %d peers",
            transfer.room,
            len(transfer.blocks),
            transfer.bytes_sent,
            transfer.early_bytes,
            seconds,
            len(transfer.parts),
        )

    def _count_retries(
        self, transfer: OutgoingTransfer, part: OutgoingPart, seqs: list[int]
    ) -> None:
        self.metrics.retries.inc(len(seqs))
        exhausted = [seq for seq in seqs if part.tries.get(seq, 0) >= MAX_TRIES]
        if exhausted:
            self._fail(transfer, f"block {exhausted[0]} did not arrive whole in {MAX_TRIES} tries")

    @override
    def work(self) -> bool:
        return self._sender.send_some(self.peers.values())

    @override
    def take_results(self) -> None:
        for peer in self.peers.values():
            self._sender.send_read(peer)

    @override
    def tick(self) -> None:
        """Expire transfers without a message for the deadline; forget idle peers."""
        now = self.now()
        deadline_s = self.config.deadline_s
        for transfer in list(self.rooms.values()):
            if now - transfer.last_heard > deadline_s:
                self._fail(transfer, self._silence(transfer))
        for room, (_, since) in list(self._refused.items()):
            if now - since > deadline_s:
                del self._refused[room]
        self._listener.tick()

    def _silence(self, transfer: OutgoingTransfer) -> str:
        seconds = f"{self.config.deadline_s:g} s"
        if transfer.state is None:
            return f"this request did not reach the prefill instance within {seconds}"
        if transfer.request is None:
            return f"no decode instance asked for this request within {seconds}"
        return f"the decode instance has been silent about this request for {seconds}"

    @override
    def send_alive(self) -> None:
        rooms: dict[bytes, list[list[int]]] = {}
        for transfer in self.rooms.values():
            if transfer.state is None or transfer.state.over:
                continue
            for identity, part in transfer.parts.items():
                if not part.done:
                    rooms.setdefault(identity, []).append([transfer.room, part.nonce])
        for identity, peer in self.peers.items():
            for message in alive_messages(rooms.get(identity, [])):
                self._tell(peer, message)

    @override
    def close(self) -> None:
        """Fail every transfer and stop listening."""
        for transfer in list(self.rooms.values()):
            self._fail(transfer, "the prefill instance is shutting down")
        self._listener.close()
