"""Sends queued blocks: peers and rooms in round-robin order, each peer within its window."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

import zmq
from typing_extensions import override

from sgl_kvq.memory_pool.page_io.base import PoolAccess
from sgl_kvq.memory_pool.page_io.span import Buffer, Bytes
from sgl_kvq.transfer.codecs.base import Codec
from sgl_kvq.transfer.prefill.buffers import SendBuffers
from sgl_kvq.transfer.prefill.rooms import BlockState, OutgoingPart, OutgoingTransfer, Peer
from sgl_kvq.transfer.protocol.header import (
    MAX_BLOCKS,
    BlockHeader,
    pack_header,
    payload_checksum,
)
from sgl_kvq.transfer.runtime.event_loop import BLOCK
from sgl_kvq.transfer.runtime.metrics import TransferMetrics
from sgl_kvq.transfer.runtime.request_state import RequestState
from sgl_kvq.transfer.runtime.workers import Job, WorkerPool

logger = logging.getLogger(__name__)

ROUND_BYTES = 4 * 2**20
"""Sent to a peer before the others, and messages, get their turn."""
MESSAGE_BYTES = 2**19
"""Blocks are batched up to this many bytes: per-message overhead is about that of one block."""
# As numbers: pyzmq's flags are an enum, whose operators take longer than a send.
_MORE, _LAST = int(zmq.SNDMORE | zmq.NOBLOCK), int(zmq.NOBLOCK)


class ReadContext(NamedTuple):
    """What blocks are read with.

    Args:
        access: The pool.
        codec: Codec of the payloads.
        buffers: Where blocks are copied to.
        fingerprint: Digest for the headers.
    """

    access: PoolAccess
    codec: Codec
    buffers: SendBuffers
    fingerprint: int


class OutgoingBlock(Job):
    """Job that copies a block out of the pool, encodes and hashes it.

    Args:
        part: The part of a transfer that it belongs to.
        seq: Its number.
        request_state: State of the request.
        context: What it is read with.

    Attributes:
        nbytes: Payload before the codec; it counts as in flight from now on.
        buffer: Where the payload is copied to; None if it is sent from where it lies.
        payload: Payload as sent, once the job is done.
        header: Packed header, once the job is done.
    """

    def __init__(
        self, part: OutgoingPart, seq: int, request_state: RequestState, context: ReadContext
    ) -> None:
        self.part, self.seq, self.request_state, self._context = part, seq, request_state, context
        self.block = part.transfer.blocks[seq]
        self.buffer: Bytes | None = None
        span, access = self.block.span, context.access
        if span is None:
            self.payload: Buffer = self.block.metadata
        elif (view := access.view(span, part.heads)) is not None:
            self.payload = view.data
        else:
            nbytes = access.span_bytes(span, part.heads)
            self.buffer = context.buffers.take(nbytes)
            self.payload = self.buffer[:nbytes].data
        self.header = b""
        super().__init__(len(self.payload))

    @property
    def is_wanted(self) -> bool:
        """Whether the peer waits for it, and the pages are still those of the request."""
        return not self.request_state.over and self.part.state_of(self.seq) is BlockState.READING

    @override
    def work(self) -> None:
        span, codec = self.block.span, self._context.codec
        if self.buffer is not None and span is not None:
            self._context.access.read(span, self.part.heads, self.buffer[: self.nbytes])
        self.payload = codec.encode(self.payload)
        heads = self.part.heads
        self.header = pack_header(
            BlockHeader(
                kind=self.block.kind,
                codec=codec.id,
                room=self.part.transfer.room,
                nonce=self.part.nonce,
                fingerprint=self._context.fingerprint,
                seq=self.seq,
                first_page=self.block.first_page,
                num_pages=span.num_pages if span else 0,
                first_layer=span.first_layer if span else 0,
                num_layers=span.num_layers if span else 0,
                first_head=heads.first,
                num_heads=heads.count,
                num_rows=span.num_rows if span else 0,
                raw_bytes=self.nbytes,
                wire_bytes=len(self.payload),
                checksum=payload_checksum([self.payload]),
            )
        )


class BlockSender:
    """Reads blocks from the pool when their turn comes, so that only the window is in memory.

    Args:
        socket: ROUTER socket of the prefill rank.
        context: What blocks are read with.
        workers: Threads that read and hash.
        metrics: Where to count.
        now: Clock, in seconds.
        on_sending: Called with the room when its first block leaves.
        fail: Ends a transfer with a reason.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        context: ReadContext,
        workers: WorkerPool,
        metrics: TransferMetrics,
        now: Callable[[], float],
        on_sending: Callable[[int], None],
        fail: Callable[[OutgoingTransfer, str], None],
    ) -> None:
        self._socket = socket
        self._context, self._workers = context, workers
        self._parts_of_a_page = context.access.num_layers * context.access.heads.count
        self._metrics, self._now = metrics, now
        self._on_sending, self._fail = on_sending, fail

    def send_some(self, peers: Iterable[Peer]) -> bool:
        """Send a few messages to each peer; True if one has more that fits its window."""
        more = False
        for peer in peers:
            share = ROUND_BYTES
            while share > 0 and (message := self._next_message(peer)):
                share -= sum(block.nbytes for block in message)
                peer.messages.append(message)
                self._workers.run(message)
                self.send_read(peer)
            more |= share <= 0
        return more

    def _next_message(self, peer: Peer) -> list[OutgoingBlock]:
        """Blocks for one message to a peer; empty if none is left or the window is full."""
        message: list[OutgoingBlock] = []
        nbytes, limit = 0, min(MESSAGE_BYTES, peer.pace.message_bytes)
        while nbytes < limit and len(message) < MAX_BLOCKS:
            block = self._next_block(peer)
            if block is None:
                break
            nbytes += block.nbytes
            message.append(block)
        return message

    def _next_block(self, peer: Peer) -> OutgoingBlock | None:
        while peer.round_robin and peer.reachable and peer.bytes_in_flight < peer.pace.window_bytes:
            part = next(iter(peer.round_robin))
            seq = part.next_queued()
            if seq is None:
                del peer.round_robin[part]
                continue
            peer.round_robin.move_to_end(part)
            state = part.transfer.state
            if state is None or state.over:
                continue
            try:
                block = OutgoingBlock(part, seq, state, self._context)
            except Exception as error:
                self._give_up(part.transfer, seq, error)
                continue
            part.transition(seq, BlockState.READING)
            peer.bytes_in_flight += block.nbytes
            return block
        return None

    def send_read(self, peer: Peer) -> None:
        """Send messages whose blocks have been read and hashed, in order."""
        while peer.messages and peer.messages[0][-1].done:
            message = peer.messages.popleft()
            for block in message:
                peer.bytes_in_flight -= block.nbytes
                if block.error is not None and block.is_wanted:
                    self._give_up(block.part.transfer, block.seq, block.error)
            sent = [block for block in message if block.is_wanted]
            if not sent or not self._send(peer, sent):
                sent = []
            for block in message:
                if block.buffer is not None and block not in sent:
                    self._context.buffers.give(block.buffer)

    def _give_up(self, transfer: OutgoingTransfer, seq: int, error: Exception) -> None:
        logger.error("kvq-zmq: block %d of room %d", seq, transfer.room, exc_info=error)
        self._fail(transfer, f"block {seq} cannot be sent: {error}")

    def _send(self, peer: Peer, message: list[OutgoingBlock]) -> bool:
        """Send blocks in one message; False if the peer is not connected, they are queued then."""
        try:
            headers = b"".join(block.header for block in message)
            for frame in (peer.identity, BLOCK, headers):
                self._socket.send(frame, _MORE)
            for block in message[:-1]:
                self._socket.send(block.payload, _MORE, copy=False)
            self._socket.send(message[-1].payload, _LAST, copy=False)
        except zmq.ZMQError as error:
            peer.reachable = False
            for block in message:
                block.part.transition(block.seq, BlockState.QUEUED)
            logger.debug("kvq-zmq: peer %s unreachable: %s", peer.identity.hex(), error)
            return False
        now = self._now()
        for block in message:
            self._count_sent(block, now)
        return True

    def _count_sent(self, block: OutgoingBlock, now: float) -> None:
        part, span, wire_bytes = block.part, block.block.span, len(block.payload)
        transfer = part.transfer
        part.mark_sent(block.seq, wire_bytes, block.buffer, now)
        if transfer.bytes_sent == 0:
            block.request_state.advance(lambda: self._on_sending(transfer.room))
        transfer.bytes_sent += wire_bytes
        page_parts = span.num_pages * span.num_layers * part.heads.count if span else 0
        self._metrics.count_block(block.block.kind, wire_bytes, page_parts, self._parts_of_a_page)
