"""What a decode rank receives (no sockets): transfers, their parts by prefill rank, blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from sgl_kvq.errors import TransferError, WireError
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.memory_pool.page_io.base import PoolAccess
from sgl_kvq.memory_pool.page_io.span import Buffer, HeadRange, PageIds, PageSpan, SpanKind
from sgl_kvq.transfer.codecs.registry import decode_payload
from sgl_kvq.transfer.decode.sources import Source, check_sources
from sgl_kvq.transfer.protocol.header import BlockHeader, BlockKind, check_payload
from sgl_kvq.transfer.protocol.messages import MAX_LIST, Request
from sgl_kvq.transfer.protocol.prompt import Prompt
from sgl_kvq.transfer.runtime.request_state import RequestState
from sgl_kvq.transfer.runtime.workers import Job

Bools = npt.NDArray[np.bool_]
_SPAN_KINDS = tuple(SpanKind)
_NO_PLACE, _INVALID_PLACE = np.zeros(0, dtype=bool), np.zeros(1, dtype=bool)


class IncomingTransfer:
    """Pages that wait for their bytes, in one part from each prefill rank.

    Args:
        room: SGLang's `bootstrap_room`.
        nonce: Random number of this transfer, uint64.
        state: State of the request; blocks are written by its `write`, so that nothing is written
            once the scheduler thread has ended the transfer.
        prefix_pages: Leading pages of the sequence that are here already.
        pages: int64 [n], where the other pages go in the pool.
        fence: `PoolAccess.fence` after the pages were allocated.
        prompt: The tokens of the request, for the prefill rank to compare.
        store_metadata: Called with SGLang's record of the first token.

    Attributes:
        started: When the transfer thread took it over, in seconds.
    """

    def __init__(
        self,
        room: int,
        nonce: int,
        state: RequestState,
        prefix_pages: int,
        pages: PageIds,
        fence: list[Any],
        prompt: Prompt,
        store_metadata: Callable[[bytes], None],
    ) -> None:
        self.room, self.nonce, self.state = room, nonce, state
        self.prefix_pages, self.pages, self.fence = prefix_pages, pages, fence
        self.prompt, self.store_metadata = prompt, store_metadata
        self.metadata: bytes | None = None
        self.parts: list[IncomingPart] = []
        self.started = 0.0

    @property
    def complete(self) -> bool:
        """Whether every part has everything."""
        return all(part.complete for part in self.parts)

    def check_sources(self, wanted: HeadRange) -> None:
        """Once all prefill ranks are known, make sure that they hold exactly these heads.

        Raises:
            TransferError: heads are missing or held too often.
        """
        sources = [part.source for part in self.parts if part.source is not None]
        if len(sources) == len(self.parts):
            check_sources(sources, wanted)


class IncomingBlock(Job):
    """Job that verifies a received block, decodes it and writes it to the pool.

    Args:
        part: The part of a transfer that it belongs to.
        header: Its header.
        payload: Payload as received.
        place: Flags of what it fills, cleared when it was claimed; None for a duplicate of a block
            that is written.
    """

    def __init__(
        self, part: IncomingPart, header: BlockHeader, payload: Buffer, place: Bools | None
    ) -> None:
        super().__init__(len(payload))
        self.part, self.header, self.payload, self.place = part, header, payload, place
        self.done = place is None

    @override
    def work(self) -> None:
        check_payload(self.header, self.payload)
        raw = decode_payload(self.header.codec, self.payload, self.header.raw_bytes)
        if self.header.kind is BlockKind.METADATA:
            self.payload = bytes(raw)
        else:
            self.part.write(self.header, raw)


class IncomingPart:
    """The part of a transfer that one prefill rank sends.

    Args:
        transfer: The transfer.
        access: The pool of this rank.
        fingerprint: Digest that every block must carry.
        peers: Decode ranks that send this prefill rank a request for the room.
        now: Present time, in seconds.

    Attributes:
        source: The prefill rank and the KV heads that it sends; None before the handshake.
        received: Blocks that are written.
        num_blocks: Blocks of the part; None until the metadata arrived.
        acks: Blocks to acknowledge.
        nacks: Blocks to request again.
        done_sent: Whether the prefill rank was told that everything is written.
    """

    def __init__(
        self,
        transfer: IncomingTransfer,
        access: PoolAccess,
        fingerprint: int,
        peers: int,
        now: float,
    ) -> None:
        self.transfer, self._access, self._fingerprint = transfer, access, fingerprint
        self.peers = peers
        self.source: Source | None = None
        self.received: set[int] = set()
        self._being_written: set[int] = set()
        self.num_blocks: int | None = None
        self.acks: list[int] = []
        self.nacks: list[int] = []
        self.done_sent = False
        self.last_heard = self.last_progress = self.requested = now
        self.wire_bytes = 0
        # What is neither written nor claimed: closed pages by layer, 16-bit rows by layer.
        num_layers, num_pages = access.num_layers, len(transfer.pages)
        held = access.held_rows(transfer.pages, transfer.fence) if num_pages else frozenset()
        has_open = SpanKind.OPEN_ROWS in held
        has_sink = SpanKind.SINK_ROWS in held
        self._pages_missing = np.ones((num_layers, num_pages), dtype=bool)
        if has_open:
            self._pages_missing[:, -1] = False  # the last page arrives as rows
        first_is_closed = num_pages > int(has_open) and transfer.prefix_pages == 0
        self._rows_missing = {
            BlockKind.OPEN_ROWS: np.full(num_layers, has_open),
            BlockKind.SINK_ROWS: np.full(num_layers, has_sink and first_is_closed),
        }

    @property
    def heads(self) -> HeadRange:
        """KV heads that the prefill rank sends; none before the handshake."""
        return self.source.heads if self.source else HeadRange(0, 0)

    def set_source(self, source: Source) -> None:
        """Note which prefill rank sends this part.

        Raises:
            TransferError: it holds other heads than before.
        """
        if self.source is not None and self.source.heads != source.heads:
            raise TransferError(
                f"{source.endpoint} held KV heads {self.heads.first} to {self.heads.end - 1} and "
                f"holds {source.heads.first} to {source.heads.end - 1} after a new handshake"
            )
        self.source = source

    def request(self) -> Request:
        """The message that requests everything that is not here yet."""
        transfer = self.transfer
        return Request(
            room=transfer.room,
            nonce=transfer.nonce,
            prefix_pages=transfer.prefix_pages,
            num_pages=len(transfer.pages),
            first_head=self.heads.first,
            num_heads=self.heads.count,
            peers=self.peers,
            num_tokens=transfer.prompt.num_tokens,
            token_digest=transfer.prompt.digest,
            weights=transfer.prompt.weights,
            have=sorted(self.received)[:MAX_LIST],
        )

    @property
    def complete(self) -> bool:
        """Whether every block has been verified and written."""
        if self.source is None or self._being_written or len(self.received) != self.num_blocks:
            return False
        return not self._pages_missing.any() and not any(
            rows.any() for rows in self._rows_missing.values()
        )

    def claim(self, header: BlockHeader, payload: Buffer) -> IncomingBlock | None:
        """Claim the place of a block, so that no other block is written there.

        Args:
            header: Header with this room and nonce.
            payload: Payload as received.

        Returns:
            The job that writes it, to run in any thread unless it is done, and then to `record`;
            None if the same block is being written.

        Raises:
            WireError: the block does not belong to this transfer; sending it again cannot help.
        """
        if header.seq in self.received:
            return IncomingBlock(self, header, payload, None)
        if header.seq in self._being_written:
            return None
        place = self._check_header(header)
        place[:] = False
        self._being_written.add(header.seq)
        return IncomingBlock(self, header, payload, place)

    def record(self, block: IncomingBlock) -> bool:
        """Note the result of a job.

        Returns:
            False for a duplicate of a block that was written before.

        Raises:
            ChecksumError: the block must be sent again.
            Exception: the job failed; sending the block again cannot help.
        """
        header = block.header
        if block.place is None:
            return False
        self._being_written.discard(header.seq)
        if block.error is not None:
            block.place[:] = True
            raise block.error
        if header.kind is BlockKind.METADATA:
            self.num_blocks = header.seq + 1
            self.transfer.metadata = self.transfer.metadata or bytes(block.payload)
        self.received.add(header.seq)
        self.wire_bytes += header.wire_bytes
        return True

    def _check_header(self, header: BlockHeader) -> Bools:
        """Flags of the place of a block, all set.

        Raises:
            WireError: the place is outside the transfer's own pages, slots, layers and heads, or
                claimed.
        """
        if header.fingerprint != self._fingerprint:
            raise WireError(f"block {header.seq}: made for another format or model")
        if header.kind is BlockKind.METADATA:
            return _NO_PLACE
        if header.first_head != self.heads.first or header.num_heads != self.heads.count:
            raise WireError(
                f"block {header.seq}: expected {self.heads.count} heads from {self.heads.first}, "
                f"got {header.num_heads} from {header.first_head}"
            )
        end_layer = header.first_layer + header.num_layers
        if header.num_layers == 0 or end_layer > self._access.num_layers:
            raise WireError(
                f"block {header.seq}: layers {header.first_layer} to {end_layer} of "
                f"{self._access.num_layers}"
            )
        place = self._place(header)
        if np.count_nonzero(place) != place.size:  # a tenth of the time of `all`
            raise WireError(f"block {header.seq}: its place is taken or not part of the transfer")
        return place

    def _place(self, header: BlockHeader) -> Bools:
        """Flags of what the block would fill; not all set if it cannot be filled."""
        layers = slice(header.first_layer, header.first_layer + header.num_layers)
        if header.kind is not BlockKind.PAGES:
            if header.kind is BlockKind.OPEN_ROWS:
                fits = 0 < header.num_rows < PAGE_SIZE
            else:
                fits = header.num_rows == self._access.pool.plan.sink_tokens
            if header.num_pages or not fits:
                return _INVALID_PLACE
            return self._rows_missing[header.kind][layers]
        first = header.first_page - self.transfer.prefix_pages
        end = first + header.num_pages
        if header.num_pages == 0 or first < 0 or end > len(self.transfer.pages):
            return _INVALID_PLACE
        return self._pages_missing[layers, first:end]

    def write(self, header: BlockHeader, raw: Buffer) -> None:
        """Write a verified block whose place is claimed; in any thread."""
        pages, kind = self.transfer.pages, _SPAN_KINDS[header.kind]
        if kind is SpanKind.PAGES:
            first = header.first_page - self.transfer.prefix_pages
            pages = pages[first : first + header.num_pages]
        else:
            pages = pages[-1:] if kind is SpanKind.OPEN_ROWS else pages[:1]
        span = PageSpan(kind, pages, header.first_layer, header.num_layers, header.num_rows)
        self.transfer.state.write(lambda: self._access.write(span, self.heads, raw))
