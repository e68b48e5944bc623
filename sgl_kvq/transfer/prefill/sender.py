"""Sends queued blocks: peers in turns, rooms in turns, each peer within its window."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import zmq

from sgl_kvq.memory_pool.page_io.cpu import PoolAccess
from sgl_kvq.transfer.codecs import get_codec
from sgl_kvq.transfer.options import TransferConfig
from sgl_kvq.transfer.prefill.buffers import SendBuffers
from sgl_kvq.transfer.prefill.rooms import OutRoom, Peer, Reading, ReadingTools
from sgl_kvq.transfer.protocol.header import MAX_BLOCKS
from sgl_kvq.transfer.runtime.event_loop import BLOCK
from sgl_kvq.transfer.runtime.metrics import TransferMetrics
from sgl_kvq.transfer.runtime.workers import Helpers

logger = logging.getLogger(__name__)

ROUND_BYTES = 4 * 2**20
"""Sent to a peer before the others, and messages, get their turn."""
MESSAGE_BYTES = 2**19
"""A message takes further blocks until it has so many; it costs Python as much as a block does."""
# As numbers: pyzmq's flags are an enum, whose operators take longer than a send.
_MORE, _LAST = int(zmq.SNDMORE | zmq.NOBLOCK), int(zmq.NOBLOCK)


class Pump:
    """Reads blocks from the pool when their turn comes, so that only the window is in memory.

    Args:
        socket: ROUTER socket of the prefill rank.
        access: Its pool.
        buffers: What blocks are read into; `Outbound` gives them back.
        helpers: Threads that read and hash.
        config: Window and codec.
        digest: Fingerprint for the headers.
        metrics: Where to count.
        on_sending: Called with the room when its first block leaves.
        fail: Ends a room with a reason.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        access: PoolAccess,
        buffers: SendBuffers,
        helpers: Helpers,
        config: TransferConfig,
        digest: int,
        metrics: TransferMetrics,
        on_sending: Callable[[int], None],
        fail: Callable[[OutRoom, str], None],
    ) -> None:
        self._socket, self._window_bytes = socket, config.window_bytes
        self._tools = ReadingTools(access, get_codec(config.codec), buffers, digest)
        self._parts_of_a_page = access.num_layers * access.heads.count
        self._metrics, self._on_sending, self._fail = metrics, on_sending, fail
        self._buffers, self._helpers = buffers, helpers

    def send_some(self, peers: Iterable[Peer]) -> bool:
        """Send a few messages to each peer; True if one has more that fits its window."""
        more = False
        for peer in peers:
            share = ROUND_BYTES
            while share > 0 and (message := self._next_message(peer)):
                share -= sum(reading.nbytes for reading in message)
                peer.messages.append(message)
                self._helpers.run(message)
                self.send_read(peer)
            more |= share <= 0
        return more

    def _next_message(self, peer: Peer) -> list[Reading]:
        """Blocks for one message to a peer; empty if none is left or the window is full."""
        message: list[Reading] = []
        nbytes = 0
        while nbytes < MESSAGE_BYTES and len(message) < MAX_BLOCKS:
            reading = self._next_block(peer)
            if reading is None:
                break
            nbytes += reading.nbytes
            message.append(reading)
        return message

    def _next_block(self, peer: Peer) -> Reading | None:
        while peer.turn and peer.reachable and peer.bytes_in_flight < self._window_bytes:
            outbound = peer.turn[0]
            if not outbound.pending:
                peer.turn.popleft()
                continue
            peer.turn.rotate(-1)
            seq, out = outbound.pending.popleft(), outbound.room
            if out.ticket is None or out.ticket.over:
                continue
            try:
                reading = Reading(outbound, seq, out.ticket, self._tools)
            except Exception as error:
                self._give_up(out, seq, error)
                continue
            outbound.reading.add(seq)
            peer.bytes_in_flight += reading.nbytes
            return reading
        return None

    def send_read(self, peer: Peer) -> None:
        """Send messages whose blocks have been read and hashed, in order."""
        while peer.messages and peer.messages[0][-1].done:
            message = peer.messages.popleft()
            for reading in message:
                reading.outbound.reading.discard(reading.seq)
                peer.bytes_in_flight -= reading.nbytes
                if reading.error is not None and reading.is_wanted:
                    self._give_up(reading.outbound.room, reading.seq, reading.error)
            sent = [reading for reading in message if reading.is_wanted]
            if not sent or not self._send(peer, sent):
                sent = []
            for reading in message:
                if reading.buffer is not None and reading not in sent:
                    self._buffers.give(reading.buffer)

    def _give_up(self, out: OutRoom, seq: int, error: Exception) -> None:
        logger.error("kvq-zmq: block %d of room %d", seq, out.room, exc_info=error)
        self._fail(out, f"block {seq} cannot be sent: {error}")

    def _send(self, peer: Peer, message: list[Reading]) -> bool:
        """Send blocks in one message; False if the peer is not connected, they are queued then."""
        try:
            headers = b"".join(reading.header for reading in message)
            for frame in (peer.identity, BLOCK, headers):
                self._socket.send(frame, _MORE)
            for reading in message[:-1]:
                self._socket.send(reading.payload, _MORE, copy=False)
            self._socket.send(message[-1].payload, _LAST, copy=False)
        except zmq.ZMQError as error:
            peer.reachable = False
            for reading in message:
                reading.outbound.enqueue([reading.seq])
            logger.debug("kvq-zmq: peer %s unreachable: %s", peer.identity.hex(), error)
            return False
        for reading in message:
            self._note_sent(reading)
        return True

    def _note_sent(self, reading: Reading) -> None:
        block, outbound, wire_bytes = reading.block, reading.outbound, len(reading.payload)
        out = outbound.room
        outbound.sent(reading.seq, wire_bytes, reading.buffer)
        if out.bytes_sent == 0:
            reading.ticket.advance(lambda: self._on_sending(out.room))
        out.bytes_sent += wire_bytes
        self._metrics.count_block(
            block.kind,
            wire_bytes,
            block.num_pages * block.num_layers * outbound.heads.count,
            self._parts_of_a_page,
        )
