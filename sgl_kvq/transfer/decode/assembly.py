"""Bookkeeping of what a decode rank receives (no sockets): a transfer and its parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from sgl_kvq.errors import WireError
from sgl_kvq.memory_pool.page_io.cpu import PoolAccess
from sgl_kvq.transfer.blocks import HeadRange, PageIds
from sgl_kvq.transfer.codecs import decode_payload
from sgl_kvq.transfer.protocol.header import BlockHeader, BlockKind, Buffer, check_payload
from sgl_kvq.transfer.protocol.messages import MAX_LIST, Request
from sgl_kvq.transfer.runtime.request_state import RequestState
from sgl_kvq.transfer.runtime.workers import Job

Bools = npt.NDArray[np.bool_]
_NOTHING, _NOT_OURS = np.zeros(0, dtype=bool), np.zeros(1, dtype=bool)


class InTransfer:
    """Pages that wait for their bytes, shared by the parts that arrive from each prefill rank.

    Args:
        room: SGLang's `bootstrap_room`.
        nonce: Drawn for this transfer, uint64.
        ticket: Its state; blocks are written by its `write`, so that nothing is written once the
            scheduler thread has ended the transfer.
        prefix_pages: Pages that are here already.
        pages: int64 [n], where the other pages go in the pool.
        fence: `PoolAccess.fence` after the pages were allocated.
        store_metadata: Called with SGLang's record of the first token.
    """

    def __init__(
        self,
        room: int,
        nonce: int,
        ticket: RequestState,
        prefix_pages: int,
        pages: PageIds,
        fence: list[Any],
        store_metadata: Callable[[bytes], None],
    ) -> None:
        self.room, self.nonce, self.ticket = room, nonce, ticket
        self.prefix_pages, self.pages, self.fence = prefix_pages, pages, fence
        self.store_metadata = store_metadata
        self.metadata: bytes | None = None
        self.parts: list[InPart] = []
        self.started = time.monotonic()

    @property
    def complete(self) -> bool:
        """Whether every part has everything."""
        return all(part.complete for part in self.parts)


class Landing(Job):
    """A block on its way from the socket to the pool: verified, decoded, written.

    Args:
        part: Whose it is.
        header: Of the block.
        payload: As received.
        left: What it fills, claimed for it; None if it is here already.
    """

    def __init__(
        self, part: InPart, header: BlockHeader, payload: Buffer, left: Bools | None
    ) -> None:
        super().__init__(len(payload))
        self.part, self.header, self.payload, self.left = part, header, payload, left
        self.done = left is None

    def work(self) -> None:
        """As the base."""
        check_payload(self.header, self.payload)
        raw = decode_payload(self.header.codec, self.payload, self.header.raw_bytes)
        if self.header.kind is BlockKind.METADATA:
            self.payload = bytes(raw)
        else:
            self.part.write(self.header, raw)


class InPart:
    """What one prefill rank sends of a transfer.

    Args:
        transfer: The transfer.
        access: The pool of this rank.
        fingerprint: Digest that every block must carry.
        peers: Decode ranks that ask this prefill rank for the room.
    """

    def __init__(
        self, transfer: InTransfer, access: PoolAccess, fingerprint: int, peers: int
    ) -> None:
        self.transfer, self._access, self._fingerprint = transfer, access, fingerprint
        self.peers = peers
        self.heads = HeadRange(0, 0)
        self.received: set[int] = set()
        self._landing: set[int] = set()
        self.num_blocks: int | None = None
        self.acks: list[int] = []
        self.nacks: list[int] = []
        self.said_done = False
        self.last_sign = self.last_progress = time.monotonic()
        self.wire_bytes = 0
        # What has been written: closed pages by layer, and the two kinds of 16-bit rows by layer.
        num_layers, num_pages = access.num_layers, len(transfer.pages)
        self._pages_left = np.ones((num_layers, num_pages), dtype=bool)
        sink_slot, open_slot = (
            access.held_slots(transfer.pages, transfer.fence) if num_pages else (0, 0)
        )
        has_open, has_sink = open_slot > 0, sink_slot > 0
        self._slots = {
            BlockKind.OPEN_ROWS: np.array([open_slot]),
            BlockKind.SINK_ROWS: np.array([sink_slot]),
        }
        if num_pages and has_open:
            self._pages_left[:, -1] = False  # the last page arrives as rows
        closed_first = num_pages > (1 if has_open else 0) and transfer.prefix_pages == 0
        self._rows_left = {
            BlockKind.OPEN_ROWS: np.full(num_layers, bool(num_pages) and has_open),
            BlockKind.SINK_ROWS: np.full(num_layers, has_sink and closed_first),
        }

    def request(self) -> Request:
        """The message that asks for everything that is not here yet."""
        transfer = self.transfer
        return Request(
            room=transfer.room,
            nonce=transfer.nonce,
            prefix_pages=transfer.prefix_pages,
            num_pages=len(transfer.pages),
            first_head=self.heads.first,
            num_heads=self.heads.count,
            peers=self.peers,
            have=sorted(self.received)[:MAX_LIST],
        )

    @property
    def complete(self) -> bool:
        """Whether every block has been verified and written."""
        if self._landing or self.num_blocks is None or len(self.received) != self.num_blocks:
            return False
        return not self._pages_left.any() and not any(
            rows.any() for rows in self._rows_left.values()
        )

    def begin(self, header: BlockHeader, payload: Buffer) -> Landing:
        """Claim the place of a block, so that nothing else is written there.

        Args:
            header: Of this room and nonce.
            payload: As received.

        Returns:
            What is to be run in any thread, unless it is done, and then settled.

        Raises:
            WireError: the block does not belong into this transfer, or is being written.
        """
        if header.seq in self.received:
            return Landing(self, header, payload, None)
        if header.seq in self._landing:
            raise WireError(f"block {header.seq}: arrived twice and is being written")
        left = self._check_header(header)
        left[:] = False
        self._landing.add(header.seq)
        return Landing(self, header, payload, left)

    def settle(self, landing: Landing) -> bool:
        """Note what became of a block.

        Returns:
            False for a block that was here already.

        Raises:
            ChecksumError: the block must be sent again.
            WireError: the block makes no sense; nothing was written.
        """
        header = landing.header
        if landing.left is None:
            return False
        self._landing.discard(header.seq)
        if landing.error is not None:
            landing.left[:] = True
            raise landing.error
        if header.kind is BlockKind.METADATA:
            self.num_blocks = header.seq + 1
            self.transfer.metadata = self.transfer.metadata or bytes(landing.payload)
        self.received.add(header.seq)
        self.wire_bytes += header.wire_bytes
        self.last_progress = time.monotonic()
        return True

    def _check_header(self, header: BlockHeader) -> Bools:
        """What a block fills; refuse one outside the transfer's own pages, slots, layers, heads."""
        if header.fingerprint != self._fingerprint:
            raise WireError(f"block {header.seq}: made for another format or model")
        if header.kind is BlockKind.METADATA:
            return _NOTHING
        if header.first_head != self.heads.first or header.num_heads != self.heads.count:
            raise WireError(
                f"block {header.seq}: {header.num_heads} heads from {header.first_head}, asked for "
                f"{self.heads.count} from {self.heads.first}"
            )
        if (
            header.num_layers == 0
            or header.first_layer + header.num_layers > self._access.num_layers
        ):
            raise WireError(
                f"block {header.seq}: layers {header.first_layer} to "
                f"{header.first_layer + header.num_layers} of {self._access.num_layers}"
            )
        left = self._left(header)
        if np.count_nonzero(left) != left.size:  # a tenth of the time of `all`
            raise WireError(f"block {header.seq}: its place is taken or not part of the transfer")
        return left

    def _left(self, header: BlockHeader) -> Bools:
        """What the block would fill, as bools; all True if nothing of it is filled."""
        layers = slice(header.first_layer, header.first_layer + header.num_layers)
        if header.kind is not BlockKind.PAGES:
            rows = self._access.pool.plan.sink_tokens
            if header.num_pages or not (
                0 < header.num_rows < 64
                if header.kind is BlockKind.OPEN_ROWS
                else header.num_rows == rows
            ):
                return _NOT_OURS
            return self._rows_left[header.kind][layers]
        first = header.first_page - self.transfer.prefix_pages
        end = first + header.num_pages
        if header.num_pages == 0 or first < 0 or end > len(self.transfer.pages):
            return _NOT_OURS
        return self._pages_left[layers, first:end]

    def write(self, header: BlockHeader, raw: Buffer) -> None:
        """Write a verified block whose place is claimed; in any thread."""
        transfer = self.transfer
        if header.kind is BlockKind.PAGES:
            first = header.first_page - transfer.prefix_pages
            place = transfer.pages[first : first + header.num_pages]
        else:
            place = self._slots[header.kind]
        transfer.ticket.write(lambda: self._access.write(header, raw, place))
