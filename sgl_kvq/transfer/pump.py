"""Sends queued blocks: peers in turns, rooms in turns, each peer within its window."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import zmq

from sgl_kvq.config import PAGE_SIZE
from sgl_kvq.transfer.blocks import Block, PoolAccess
from sgl_kvq.transfer.codecs import get_codec
from sgl_kvq.transfer.metrics import TransferMetrics
from sgl_kvq.transfer.options import TransferConfig
from sgl_kvq.transfer.outbound import Outbound, OutRoom, Peer
from sgl_kvq.transfer.thread import BLOCK, Ticket
from sgl_kvq.transfer.wire import (
    HEADER_BYTES,
    BlockHeader,
    BlockKind,
    pack_header,
    payload_checksum,
)

logger = logging.getLogger(__name__)

BLOCKS_A_ROUND = 8


class Pump:
    """Reads blocks from the pool when their turn comes, so that only the window is in memory.

    Args:
        socket: ROUTER socket of the prefill rank.
        access: Its pool.
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

    def send_some(self, peers: Sequence[Peer]) -> bool:
        """Send a few blocks to each peer; True if one has more that fits its window."""
        more = False
        for peer in peers:
            for _ in range(BLOCKS_A_ROUND):
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
        block = out.blocks[seq]
        raw = self._access.read(block, outbound.heads)
        if ticket.over:
            return  # the pages may have been given to another request while they were read
        payload = self._codec.encode(raw)
        header = BlockHeader(
            kind=block.kind,
            codec=self._codec.id,
            room=out.room,
            nonce=outbound.nonce,
            fingerprint=self._digest,
            seq=seq,
            first_page=block.first_page,
            num_pages=len(block.pages),
            first_layer=block.first_layer,
            num_layers=block.num_layers,
            first_head=outbound.heads.first,
            num_heads=outbound.heads.count,
            num_rows=block.num_rows,
            raw_bytes=len(raw),
            wire_bytes=len(payload),
            checksum=payload_checksum([payload]),
        )
        for frame in (outbound.peer.identity, BLOCK, pack_header(header)):
            self._socket.send(frame, zmq.SNDMORE | zmq.NOBLOCK)
        self._socket.send(payload, zmq.NOBLOCK, copy=False)
        outbound.sent(seq, len(payload))
        if out.bytes_sent == 0:
            ticket.advance(lambda: self._on_sending(out.room))
        out.bytes_sent += len(payload)
        self._count(block, len(payload), outbound.heads.count / self._access.heads.count)

    def _count(self, block: Block, wire_bytes: int, share_of_heads: float) -> None:
        self._metrics.blocks.inc()
        self._metrics.wire_bytes[block.kind].inc(wire_bytes)
        self._metrics.header_bytes.inc(HEADER_BYTES + len(BLOCK))
        if block.kind is BlockKind.PAGES:
            share = share_of_heads * block.num_layers / self._access.num_layers
            self._metrics.closed_page_tokens.inc(PAGE_SIZE * len(block.pages) * share)
