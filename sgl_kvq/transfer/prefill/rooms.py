"""Bookkeeping of what a prefill rank sends (no sockets): rooms, peers, blocks in flight."""

from __future__ import annotations

import itertools
import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from sgl_kvq.memory_pool.page_io.cpu import PoolAccess
from sgl_kvq.transfer.blocks import Block, HeadRange
from sgl_kvq.transfer.codecs import WireCodec
from sgl_kvq.transfer.prefill.buffers import Bytes, SendBuffers
from sgl_kvq.transfer.protocol.header import (
    BlockHeader,
    BlockKind,
    Buffer,
    pack_header,
    payload_checksum,
)
from sgl_kvq.transfer.protocol.messages import Request
from sgl_kvq.transfer.runtime.request_state import RequestState
from sgl_kvq.transfer.runtime.workers import Job

MAX_TRIES = 5
MAX_ROOMS_A_PEER = 4096


@dataclass
class Flight:
    """A block that was sent and not acknowledged: when in the order of sending, its size, where."""

    order: int
    wire_bytes: int
    buffer: Bytes | None


class ReadingTools(NamedTuple):
    """What blocks are read with: the pool, a codec, buffers, the digest of the handshake."""

    access: PoolAccess
    codec: WireCodec
    buffers: SendBuffers
    fingerprint: int


class Reading(Job):
    """A block on its way from the pool to the socket: its payload is copied and hashed.

    Args:
        outbound: Whose it is.
        seq: Its number.
        ticket: Of the request.
        tools: What it is read with.

    Attributes:
        nbytes: Of the payload before the codec; they count as in flight from now on.
        buffer: Where it is copied to; None if it is sent from where it lies.
        payload: As sent.
        header: As sent, once the work is done.
    """

    def __init__(
        self, outbound: Outbound, seq: int, ticket: RequestState, tools: ReadingTools
    ) -> None:
        self.outbound, self.seq, self.ticket, self._tools = outbound, seq, ticket, tools
        self.block = block = outbound.room.blocks[seq]
        self.buffer: Bytes | None = None
        if block.kind is BlockKind.METADATA:
            self.payload: Buffer = block.data
        elif (view := tools.access.view(block, outbound.heads)) is not None:
            self.payload = view.data
        else:
            nbytes = tools.access.payload_bytes(block, outbound.heads)
            self.buffer = tools.buffers.take(nbytes)
            self.payload = self.buffer[:nbytes].data
        self.header = b""
        super().__init__(len(self.payload))

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for it, and the pages are still those of the request."""
        outbound = self.outbound
        return not (self.ticket.over or outbound.dropped or self.seq in outbound.acked)

    def work(self) -> None:
        """As the base."""
        block, outbound, codec = self.block, self.outbound, self._tools.codec
        if self.buffer is not None:
            self._tools.access.read(block, outbound.heads, self.buffer[: self.nbytes])
        self.payload = codec.encode(self.payload)
        self.header = pack_header(
            BlockHeader(
                kind=block.kind,
                codec=codec.id,
                room=outbound.room.room,
                nonce=outbound.nonce,
                fingerprint=self._tools.fingerprint,
                seq=self.seq,
                first_page=block.first_page,
                num_pages=block.num_pages,
                first_layer=block.first_layer,
                num_layers=block.num_layers,
                first_head=outbound.heads.first,
                num_heads=outbound.heads.count,
                num_rows=block.num_rows,
                raw_bytes=self.nbytes,
                wire_bytes=len(self.payload),
                checksum=payload_checksum([self.payload]),
            )
        )


@dataclass
class Peer:
    """A decode rank that passed the handshake.

    Args:
        identity: Routing id of its connection.
        instance: Drawn by its process.
        reachable: Whether ZeroMQ still has a connection to it.
        bytes_in_flight: Sent and not acknowledged, or about to be sent.
        turn: Rooms with something to send, the next one first.
        messages: Blocks about to be sent, by message, in order.
    """

    identity: bytes
    instance: int
    reachable: bool = True
    bytes_in_flight: int = 0
    last_heard: float = field(default_factory=time.monotonic)
    turn: deque[Outbound] = field(default_factory=deque)
    messages: deque[list[Reading]] = field(default_factory=deque)


class Outbound:
    """One decode rank's share of one room.

    Args:
        room: The room.
        peer: Where it goes.
        request: As the peer sent it first.
        buffers: Where a block's buffer goes once the block has landed.
    """

    _order = itertools.count()

    def __init__(self, room: OutRoom, peer: Peer, request: Request, buffers: SendBuffers) -> None:
        self.room = room
        self.peer = peer
        self._buffers = buffers
        self.nonce = request.nonce
        self.heads = HeadRange(request.first_head, request.first_head + request.num_heads)
        self.pending: deque[int] = deque()
        self.flights: dict[int, Flight] = {}  # in order of sending
        self.tries: dict[int, int] = {}
        self.acked: set[int] = set()
        self.reading: set[int] = set()
        self.done = self.dropped = False
        self.enqueue(range(len(room.blocks)))

    def enqueue(self, seqs: range | list[int]) -> None:
        """Queue blocks that are neither queued, in flight nor acknowledged."""
        known = self.acked.union(self.pending, self.reading, self.flights)
        fresh = [seq for seq in seqs if seq not in known]
        if fresh and self not in self.peer.turn:
            self.peer.turn.append(self)
        self.pending.extend(fresh)

    def sent(self, seq: int, wire_bytes: int, buffer: Bytes | None) -> None:
        """Note that a block left, and the buffer that it lies in."""
        self.flights[seq] = Flight(next(self._order), wire_bytes, buffer)
        self.tries[seq] = self.tries.get(seq, 0) + 1
        self.peer.bytes_in_flight += wire_bytes

    def acknowledge(self, seqs: list[int]) -> list[int]:
        """Note acknowledged blocks.

        A connection keeps the order, so a block sent before an acknowledged one and not named
        with it was lost on the way.

        Args:
            seqs: As the peer listed them; unknown ones are ignored.

        Returns:
            Blocks that were lost and are queued again.
        """
        newest = max((self.flights[seq].order for seq in seqs if seq in self.flights), default=-1)
        for seq in seqs:
            flight = self.flights.get(seq)
            if flight is not None and self._land(seq):
                self.room.bytes_landed += flight.wire_bytes
                self.acked.add(seq)
                self.tries.pop(seq, None)
        sent_before = itertools.takewhile(
            lambda seq: self.flights[seq].order < newest, self.flights
        )
        return self.send_again(list(sent_before))

    def send_again(self, seqs: list[int]) -> list[int]:
        """Queue blocks that were sent and not acknowledged; returns those that are."""
        again = [seq for seq in seqs if self._land(seq)]
        self.enqueue(again)
        return again

    def resume(self, have: list[int]) -> None:
        """The peer tells what it has: everything else is queued."""
        known = range(len(self.room.blocks))
        for seq in have:
            self._land(seq)
            if seq in known:
                self.acked.add(seq)
        for seq in list(self.flights):
            self._land(seq)
        self.pending = deque(seq for seq in self.pending if seq not in self.acked)
        self.enqueue(known)

    def drop(self) -> None:
        """Forget everything that is queued or in flight."""
        for seq in list(self.flights):
            self._land(seq)
        self.pending.clear()
        self.dropped = True
        if self in self.peer.turn:
            self.peer.turn.remove(self)

    def _land(self, seq: int) -> bool:
        flight = self.flights.pop(seq, None)
        if flight is None:
            return False
        self.peer.bytes_in_flight -= flight.wire_bytes
        if flight.buffer is not None:
            self._buffers.give(flight.buffer)
        return True


class OutRoom:
    """One request at this prefill rank.

    Args:
        room: SGLang's `bootstrap_room`.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.ticket: RequestState | None = None  # None until the request itself arrives
        self.blocks: list[Block] = []
        self.complete = False
        self.num_pages: int | None = None
        self.outbounds: dict[bytes, Outbound] = {}
        self.request: Request | None = None  # the first one; all peers must agree with it
        self.opened = self.last_sign = time.monotonic()
        self.bytes_sent = 0
        self.bytes_landed = 0
        self.early_bytes = 0  # landed before the last chunk was there

    @property
    def all_asked(self) -> bool:
        """Whether every decode rank that takes part has asked."""
        return self.request is not None and len(self.outbounds) == self.request.peers

    @property
    def all_done(self) -> bool:
        """Whether every peer has everything."""
        return (
            self.complete
            and self.all_asked
            and all(outbound.done for outbound in self.outbounds.values())
        )

    def refusal(self, request: Request) -> str | None:
        """Why a further decode rank cannot take part; None if it can."""
        first = self.request
        if first is None:
            return None
        if len(self.outbounds) >= first.peers:
            return "this room is served to another decode instance"
        same = (request.peers, request.prefix_pages, request.num_pages)
        if same != (first.peers, first.prefix_pages, first.num_pages):
            return "decode ranks disagree about this room"
        return None

    def add_blocks(self, blocks: list[Block], is_last: bool) -> None:
        """Queue further blocks for every peer."""
        first = len(self.blocks)
        self.blocks += blocks
        if is_last:
            self.complete, self.early_bytes = True, self.bytes_landed
        for outbound in self.outbounds.values():
            outbound.enqueue(range(first, len(self.blocks)))
