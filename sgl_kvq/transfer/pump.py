"""Sends queued blocks: peers in turns, rooms in turns, each peer within its window."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import zmq

from sgl_kvq.transfer.codecs import get_codec
from sgl_kvq.transfer.helpers import Helpers
from sgl_kvq.transfer.metrics import TransferMetrics
from sgl_kvq.transfer.options import TransferConfig
from sgl_kvq.transfer.outbound import OutRoom, Peer, Reading
from sgl_kvq.transfer.pool_access import PoolAccess
from sgl_kvq.transfer.send_buffers import SendBuffers
from sgl_kvq.transfer.thread import BLOCK
from sgl_kvq.transfer.wire import BlockHeader, pack_header

logger = logging.getLogger(__name__)

ROUND_BYTES = 4 * 2**20
"""Sent to a peer before the others, and messages, get their turn."""
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
        self._socket, self._access, self._digest = socket, access, digest
        self._window_bytes = config.window_bytes
        self._codec = get_codec(config.codec)
        self._metrics, self._on_sending, self._fail = metrics, on_sending, fail
        self._buffers, self._helpers = buffers, helpers

    def send_some(self, peers: Iterable[Peer]) -> bool:
        """Send a few blocks to each peer; True if one has more that fits its window."""
        more = False
        for peer in peers:
            share = ROUND_BYTES
            while share > 0 and (nbytes := self._read_next(peer)) is not None:
                share -= nbytes
                self.send_read(peer)
            more |= share <= 0
        return more

    def _read_next(self, peer: Peer) -> int | None:
        """Begin with a peer's next block; its bytes, None if none is left or the window is full."""
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
                reading = Reading(
                    outbound, seq, out.ticket, self._access, self._codec, self._buffers
                )
            except Exception as error:
                self._give_up(out, seq, error)
                continue
            outbound.reading.add(seq)
            peer.bytes_in_flight += reading.nbytes
            peer.readings.append(reading)
            self._helpers.run(reading, reading.nbytes)
            return reading.nbytes
        return None

    def send_read(self, peer: Peer) -> None:
        """Send what has been read and hashed, in order."""
        while peer.readings and peer.readings[0].done:
            reading = peer.readings.popleft()
            outbound, seq = reading.outbound, reading.seq
            peer.bytes_in_flight -= reading.nbytes
            outbound.reading.discard(seq)
            sent = False
            try:
                sent = self._send(reading)
            except zmq.ZMQError as error:
                peer.reachable = False
                outbound.enqueue([seq])
                logger.debug("kvq-zmq: peer %s unreachable: %s", peer.identity.hex(), error)
            except Exception as error:
                self._give_up(outbound.room, seq, error)
            if not sent and reading.buffer is not None:
                self._buffers.give(reading.buffer)

    def _give_up(self, out: OutRoom, seq: int, error: Exception) -> None:
        logger.error("kvq-zmq: block %d of room %d", seq, out.room, exc_info=error)
        self._fail(out, f"block {seq} cannot be sent: {error}")

    def _send(self, reading: Reading) -> bool:
        """Send a block; False if nobody waits for it any more.

        Raises:
            zmq.ZMQError: the peer is not connected.
            Exception: it could not be read.
        """
        outbound, seq = reading.outbound, reading.seq
        out, heads = outbound.room, outbound.heads
        # Over: the pages may have been given to another request before they were hashed.
        if reading.ticket.over or outbound.dropped or seq in outbound.acked:
            return False
        if reading.error is not None:
            raise reading.error
        block, payload = reading.block, reading.payload
        header = BlockHeader(
            kind=block.kind,
            codec=self._codec.id,
            room=out.room,
            nonce=outbound.nonce,
            fingerprint=self._digest,
            seq=seq,
            first_page=block.first_page,
            num_pages=block.num_pages,
            first_layer=block.first_layer,
            num_layers=block.num_layers,
            first_head=heads.first,
            num_heads=heads.count,
            num_rows=block.num_rows,
            raw_bytes=reading.nbytes,
            wire_bytes=len(payload),
            checksum=reading.checksum,
        )
        for frame in (outbound.peer.identity, BLOCK, pack_header(header)):
            self._socket.send(frame, _MORE)
        self._socket.send(payload, _LAST, copy=False)
        outbound.sent(seq, len(payload), reading.buffer)
        if out.bytes_sent == 0:
            reading.ticket.advance(lambda: self._on_sending(out.room))
        out.bytes_sent += len(payload)
        self._metrics.count_block(
            block.kind,
            len(payload),
            block.num_pages * block.num_layers * heads.count,
            self._access.num_layers * self._access.heads.count,
        )
        return True
