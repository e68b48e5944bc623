"""Sends queued blocks: peers in turns, rooms in turns, each peer within its window."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import zmq

from sgl_kvq.transfer.blocks import Block, HeadRange
from sgl_kvq.transfer.codecs import get_codec
from sgl_kvq.transfer.metrics import TransferMetrics
from sgl_kvq.transfer.options import TransferConfig
from sgl_kvq.transfer.outbound import Outbound, OutRoom, Peer
from sgl_kvq.transfer.pool_access import Bytes, PoolAccess
from sgl_kvq.transfer.send_buffers import SendBuffers
from sgl_kvq.transfer.thread import BLOCK, Ticket
from sgl_kvq.transfer.wire import BlockHeader, BlockKind, Buffer, pack_header, payload_checksum

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
        self._buffers = buffers

    def send_some(self, peers: Iterable[Peer]) -> bool:
        """Send a few blocks to each peer; True if one has more that fits its window."""
        more = False
        for peer in peers:
            enough = peer.bytes_sent + ROUND_BYTES
            while peer.bytes_sent < enough:
                if not self._send_next(peer):
                    break
            else:
                more = True
        return more

    def _send_next(self, peer: Peer) -> bool:
        """Send the next block of a peer; False if there is none or its window is full."""
        while peer.turn and not peer.turn[0].pending:
            peer.turn.popleft()
        window_full = peer.bytes_in_flight >= self._window_bytes
        if not peer.turn or window_full or not peer.reachable:
            return False
        outbound = peer.turn[0]
        peer.turn.rotate(-1)
        seq = outbound.pending.popleft()
        out = outbound.room
        if out.ticket is None or out.ticket.over:
            return True
        try:
            self._send(out, outbound, seq, out.ticket)
        except zmq.ZMQError as error:
            peer.reachable = False
            outbound.pending.appendleft(seq)
            logger.debug("kvq-zmq: peer %s unreachable: %s", peer.identity.hex(), error)
            return False
        except Exception as error:
            logger.exception("kvq-zmq: block %d of room %d", seq, out.room)
            self._fail(out, f"block {seq} cannot be sent: {error}")
        return True

    def _send(self, out: OutRoom, outbound: Outbound, seq: int, ticket: Ticket) -> None:
        block, heads = out.blocks[seq], outbound.heads
        raw, buffer = self._read(block, heads)
        payload = self._codec.encode(raw)
        checksum = payload_checksum([payload])
        if ticket.over:
            return  # the pages may have been given to another request before they were hashed
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
            raw_bytes=len(raw),
            wire_bytes=len(payload),
            checksum=checksum,
        )
        for frame in (outbound.peer.identity, BLOCK, pack_header(header)):
            self._socket.send(frame, _MORE)
        self._socket.send(payload, _LAST, copy=False)
        outbound.sent(seq, len(payload), buffer)
        if out.bytes_sent == 0:
            ticket.advance(lambda: self._on_sending(out.room))
        out.bytes_sent += len(payload)
        self._metrics.count_block(
            block.kind,
            len(payload),
            block.num_pages * block.num_layers * heads.count,
            self._access.num_layers * self._access.heads.count,
        )

    def _read(self, block: Block, heads: HeadRange) -> tuple[Buffer, Bytes | None]:
        """A block's payload, and the buffer it was read into; None if it lies in the pool."""
        if block.kind is BlockKind.METADATA:
            return block.data, None
        view = self._access.view(block, heads)
        if view is not None:
            return view.data, None
        nbytes = self._access.payload_bytes(block, heads)
        buffer = self._buffers.take(nbytes)
        self._access.read(block, heads, buffer[:nbytes])
        return buffer[:nbytes].data, buffer
