"""What a prefill rank has to send (no sockets): transfers, their parts by peer, block states."""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from sgl_kvq.memory_pool.page_io.span import Bytes, HeadRange
from sgl_kvq.transfer.blocks import Block
from sgl_kvq.transfer.prefill.buffers import SendBuffers
from sgl_kvq.transfer.prefill.pace import Pace
from sgl_kvq.transfer.protocol.messages import Request
from sgl_kvq.transfer.protocol.prompt import Prompt, check_prompts
from sgl_kvq.transfer.runtime.request_state import RequestState

if TYPE_CHECKING:
    from sgl_kvq.transfer.prefill.sender import OutgoingBlock

MAX_TRIES = 5
MAX_ROOMS_PER_PEER = 4096


class BlockState(IntEnum):
    """State of one block for one peer (integers, because hashing other enums runs Python code).

    QUEUED: waits for its turn.
    READING: copied and hashed by a job.
    IN_FLIGHT: sent and not acknowledged.
    ACKED: acknowledged; the last state.
    """

    QUEUED = 0
    READING = 1
    IN_FLIGHT = 2
    ACKED = 3


_QUEUED, _READING, _IN_FLIGHT, _ACKED = BlockState
_TRANSITIONS: dict[BlockState | None, tuple[BlockState, ...]] = {
    None: (_QUEUED,),
    _QUEUED: (_READING, _ACKED),
    _READING: (_IN_FLIGHT, _QUEUED, _ACKED),
    _IN_FLIGHT: (_ACKED, _QUEUED),
    _ACKED: (),
}


next_seqno = itertools.count().__next__
"""Position in the order of sending, over all peers."""


class InFlightBlock(NamedTuple):
    """A block that was sent and not acknowledged.

    Args:
        seqno: Position in the order of sending.
        sent_at: Time of sending, in seconds.
        wire_bytes: Payload as sent.
        buffer: Memory that ZeroMQ sends it from; None for the pool itself.
    """

    seqno: int
    sent_at: float
    wire_bytes: int
    buffer: Bytes | None


@dataclass(eq=False)
class Peer:
    """A decode rank that passed the handshake.

    Args:
        identity: Routing id of its connection.
        instance: Random number of its process.
        pace: How many bytes may be in flight.
        last_heard: Time of its last message, in seconds.
        connected: Blocks with a lower seqno were sent on a connection before this one.
        reachable: Whether ZeroMQ still has a connection to it.
        bytes_in_flight: Bytes that were sent and not acknowledged, or are being read.
        parts: Parts that are not over.
        round_robin: Parts with blocks to send, the next one first.
        messages: Messages whose blocks are being read, in order of sending.
    """

    identity: bytes
    instance: int
    pace: Pace
    last_heard: float
    connected: int = 0
    reachable: bool = True
    bytes_in_flight: int = 0
    parts: set[OutgoingPart] = field(default_factory=set)
    round_robin: OrderedDict[OutgoingPart, None] = field(default_factory=OrderedDict)
    messages: deque[list[OutgoingBlock]] = field(default_factory=deque)


class OutgoingPart:
    """The part of a transfer that one decode rank receives.

    Args:
        transfer: The transfer.
        peer: The decode rank.
        request: Its first request.
        buffers: Gets the buffers of blocks that are no longer in flight.

    Attributes:
        done: Whether the peer has everything.
        tries: How often each block was sent that is not acknowledged.
    """

    def __init__(
        self, transfer: OutgoingTransfer, peer: Peer, request: Request, buffers: SendBuffers
    ) -> None:
        self.transfer = transfer
        self.peer = peer
        self._buffers = buffers
        self.nonce = request.nonce
        self.heads = HeadRange(request.first_head, request.first_head + request.num_heads)
        self.done = False
        self.tries: dict[int, int] = {}
        self._connected = peer.connected
        self._states: dict[int, BlockState] = {}
        # By state, for the order: QUEUED in order of queueing, with others among them, ...
        self._queue: deque[int] = deque()
        self._in_flight: dict[int, InFlightBlock] = {}  # ... IN_FLIGHT in order of sending.
        peer.parts.add(self)
        self.enqueue_new()

    def state_of(self, seq: int) -> BlockState | None:
        """State of a block; None if there is none, or the part was dropped."""
        return self._states.get(seq)

    def transition(self, seq: int, state: BlockState, sent: InFlightBlock | None = None) -> None:
        """Change the state of a block, and what depends on it: queue, bytes in flight, buffer.

        Args:
            seq: Number of the block.
            state: Its new state.
            sent: How it was sent, for IN_FLIGHT.

        Raises:
            ValueError: the block cannot get from its state to this one.
        """
        old = self._states.get(seq)
        if state not in _TRANSITIONS[old]:
            raise ValueError(f"block {seq}: expected one of {_TRANSITIONS[old]}, got {state}")
        self._states[seq] = state
        if old is _IN_FLIGHT:
            self._leave_flight(seq, state is _ACKED and self.tries[seq] == 1)
        if state is _QUEUED:
            self._queue.append(seq)
            self.peer.round_robin.setdefault(self)
        elif sent is not None:
            self._in_flight[seq] = sent
            self.tries[seq] = self.tries.get(seq, 0) + 1
            self.peer.bytes_in_flight += sent.wire_bytes
        elif state is _ACKED:
            self.tries.pop(seq, None)

    def _leave_flight(self, seq: int, arrived: bool) -> None:
        block = self._in_flight.pop(seq)
        self.peer.bytes_in_flight -= block.wire_bytes
        if block.buffer is not None and arrived:
            self._buffers.give(block.buffer)

    def enqueue_new(self) -> None:
        """Queue the blocks that the transfer got since the last call."""
        for seq in range(len(self._states), len(self.transfer.blocks)):
            self.transition(seq, _QUEUED)

    def next_queued(self) -> int | None:
        """Take the next block off the queue; None if it is empty."""
        while self._queue:
            seq = self._queue.popleft()
            if self._states.get(seq) is _QUEUED:
                return seq
        return None

    def mark_sent(self, seq: int, wire_bytes: int, buffer: Bytes | None, now: float) -> None:
        """Note that a block left, and the buffer that it lies in."""
        sent = InFlightBlock(next_seqno(), now, wire_bytes, buffer)
        self.transition(seq, _IN_FLIGHT, sent)

    def acknowledge(self, seqs: list[int], now: float) -> list[int]:
        """Note acknowledged blocks.

        A connection keeps the order, so a block that was sent before an acknowledged one and is
        still in flight was lost. Of a block that was sent twice, nobody knows which one arrived.

        Args:
            seqs: Blocks that the peer has; unknown ones are ignored.
            now: Present time, in seconds.

        Returns:
            Blocks that were lost and are queued again.
        """
        in_flight = self._in_flight
        once = [seq for seq in seqs if seq in in_flight and self.tries[seq] == 1]
        newest = max((in_flight[seq].seqno for seq in once), default=-1)
        for seq in seqs:
            if seq in in_flight:
                block = in_flight[seq]
                self.transfer.bytes_landed += block.wire_bytes
                self.peer.pace.on_ack(block.wire_bytes, block.sent_at, now)
                self.transition(seq, _ACKED)
            elif seq in self.tries:  # queued again, but the first one has arrived
                self.transition(seq, _ACKED)
        lost = itertools.takewhile(lambda seq: in_flight[seq].seqno < newest, in_flight)
        return self.retransmit(list(lost))

    def retransmit(self, seqs: list[int]) -> list[int]:
        """Queue those blocks again that are in flight; returns them, each once."""
        again = []
        for seq in seqs:
            if self._states.get(seq) is _IN_FLIGHT:
                self.transition(seq, _QUEUED)
                again.append(seq)
        return again

    def resume(self, received: list[int]) -> None:
        """Queue the blocks again that were lost, once the peer says what it has.

        On a new connection, what was sent over it before the peer could say so is on its way. A
        peer that asks once more on a connection lacks what was sent over it.
        """
        for seq in received:
            if self._states.get(seq, _ACKED) is not _ACKED:
                self.transition(seq, _ACKED)
        lost = list(self._in_flight)
        if self._connected != self.peer.connected:
            self._connected = self.peer.connected
            lost = [seq for seq in lost if self._in_flight[seq].seqno < self._connected]
        self.retransmit(lost)

    def drop(self) -> None:
        """Forget every block; what is being read is not sent any more."""
        for seq in list(self._in_flight):
            self._leave_flight(seq, arrived=False)
        self._states.clear()
        self.tries.clear()
        self._queue.clear()
        self.peer.round_robin.pop(self, None)
        self.peer.parts.discard(self)


class OutgoingTransfer:
    """One request at this prefill rank.

    Args:
        room: SGLang's `bootstrap_room`.
        now: Present time, in seconds.

    Attributes:
        state: Whether the request is over; None until it arrives from SGLang.
        prompt: Its tokens; None until then.
        blocks: Blocks by number.
        complete: Whether no further blocks will come.
        num_pages: Pages that will be sent, once known.
        parts: Parts by the peer's identity.
        request: The first request; those of further peers must agree with it.
        bytes_sent: Payloads as sent, retransmissions included.
        bytes_landed: Payloads that were acknowledged.
        early_bytes: `bytes_landed` before the last chunk of the prefill.
    """

    def __init__(self, room: int, now: float) -> None:
        self.room = room
        self.state: RequestState | None = None
        self.prompt: Prompt | None = None
        self.blocks: list[Block] = []
        self.complete = False
        self.num_pages: int | None = None
        self.parts: dict[bytes, OutgoingPart] = {}
        self.request: Request | None = None
        self.opened = self.last_heard = now
        self.bytes_sent = self.bytes_landed = self.early_bytes = 0

    @property
    def all_requested(self) -> bool:
        """Whether every decode rank that takes part sent its request."""
        return self.request is not None and len(self.parts) == self.request.peers

    @property
    def all_done(self) -> bool:
        """Whether every peer has everything."""
        return (
            self.complete and self.all_requested and all(part.done for part in self.parts.values())
        )

    def refusal(self, request: Request) -> str | None:
        """Why a further decode rank cannot take part; None if it can."""
        first = self.request
        if first is None:
            return None
        if len(self.parts) >= first.peers:
            return "this room is served to another decode instance"
        if _shared_fields(request) != _shared_fields(first):
            return "decode ranks disagree about this room"
        return None

    def check_prompt(self) -> None:
        """Compare the decode instance's prompt with this one, once both are known.

        Raises:
            TransferError: their tokens or weights differ.
        """
        if self.prompt is not None and self.request is not None:
            check_prompts(self.prompt, _prompt_of(self.request))

    def add_blocks(self, blocks: list[Block], is_last: bool) -> None:
        """Queue further blocks for every peer."""
        self.blocks += blocks
        if is_last:
            self.complete, self.early_bytes = True, self.bytes_landed
        for part in self.parts.values():
            part.enqueue_new()


def _prompt_of(request: Request) -> Prompt:
    return Prompt(request.num_tokens, request.token_digest, request.weights)


def _shared_fields(request: Request) -> tuple[object, ...]:
    """What the requests of all decode ranks of a transfer have in common."""
    return request.peers, request.prefix_pages, request.num_pages, _prompt_of(request)
