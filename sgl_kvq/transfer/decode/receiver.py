"""Takes blocks of a decode rank: verified, written, answered in order of arrival."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sgl_kvq.errors import ChecksumError, KvqError, TransferError, WireError
from sgl_kvq.memory_pool.page_io.base import PoolAccess
from sgl_kvq.transfer.decode.assembly import IncomingBlock, IncomingPart, IncomingTransfer
from sgl_kvq.transfer.decode.connections import Connection
from sgl_kvq.transfer.protocol.header import HEADER_BYTES, BlockHeader, BlockKind, parse_header
from sgl_kvq.transfer.protocol.messages import Ack, Done, Message, Nack
from sgl_kvq.transfer.runtime.metrics import TransferMetrics
from sgl_kvq.transfer.runtime.workers import WorkerPool

logger = logging.getLogger(__name__)


class BlockReceiver:
    """Writes blocks to the pool and ends transfers that have everything.

    Args:
        access: The pool.
        workers: Threads that verify and write.
        metrics: Where to count.
        now: Clock, in seconds.
        send: Sends a message over a connection.
        refuse: Called with the error of a block that was dropped.
        fail: Ends a transfer with a reason.
        on_success: Called with a transfer, under its state's lock, once all of it is written.
    """

    def __init__(
        self,
        access: PoolAccess,
        workers: WorkerPool,
        metrics: TransferMetrics,
        now: Callable[[], float],
        send: Callable[[Connection, Message], None],
        refuse: Callable[[KvqError], None],
        fail: Callable[[IncomingTransfer, str], None],
        on_success: Callable[[IncomingTransfer], None],
    ) -> None:
        self._workers, self._metrics, self._now = workers, metrics, now
        self._parts_of_a_page = access.num_layers * access.heads.count
        self._send, self._refuse, self._fail, self._on_success = send, refuse, fail, on_success

    def take(self, connection: Connection, headers: memoryview, payloads: list[memoryview]) -> None:
        """Take the valid blocks of a message.

        Raises:
            WireError: not as many headers as payloads.
        """
        if len(headers) != HEADER_BYTES * len(payloads):
            raise WireError(f"{len(payloads)} blocks: got {len(headers)} bytes of headers")
        blocks = []
        for i, payload in enumerate(payloads):
            try:
                header = parse_header(headers[i * HEADER_BYTES : (i + 1) * HEADER_BYTES])
            except KvqError as error:
                connection.damaged = connection.last_heard
                self._refuse(error)
                continue
            try:
                block = self._claim(connection, header, payload)
            except WireError as error:
                self._refuse(error)
                continue
            if block is not None:
                blocks.append(block)
        connection.blocks += blocks
        self._workers.run([block for block in blocks if not block.done])

    def _claim(
        self, connection: Connection, header: BlockHeader, payload: memoryview
    ) -> IncomingBlock | None:
        part = connection.parts.get(header.room)
        if part is None or part.transfer.nonce != header.nonce:
            raise WireError(f"block {header.seq}: no such transfer (room {header.room})")
        part.last_heard = connection.last_heard
        try:
            block = part.claim(header, payload)
        except WireError as error:
            self._fail(part.transfer, str(error))
            raise
        connection.proven = True
        return block

    def answer(self, connection: Connection) -> None:
        """Ack in order: the sender treats a gap as loss. A block that cannot be stored is fatal."""
        while connection.blocks and connection.blocks[0].done:
            block = connection.blocks.popleft()
            part, header = block.part, block.header
            try:
                fresh = part.record(block)
            except ChecksumError:
                self._metrics.checksum_failures.inc()
                connection.damaged = connection.last_heard  # the Nack may get lost
                part.nacks.append(header.seq)
            except Exception as error:
                logger.error("kvq-zmq: block of room %d", header.room, exc_info=error)
                self._fail(part.transfer, f"block {header.seq} cannot be stored: {error}")
            else:
                part.acks.append(header.seq)
                if fresh:
                    self._count(part, header)
        self._flush(connection)

    def _count(self, part: IncomingPart, header: BlockHeader) -> None:
        part.last_progress = self._now()
        self._metrics.count_block(
            header.kind,
            header.wire_bytes,
            header.num_pages * header.num_layers * header.num_heads
            if header.kind is BlockKind.PAGES
            else 0,
            self._parts_of_a_page,
        )

    def _flush(self, connection: Connection) -> None:
        """Send what was gathered: damaged blocks first, then whole ones."""
        for part in list(connection.parts.values()):
            room, nonce = part.transfer.room, part.transfer.nonce
            if part.nacks:
                self._send(connection, Nack(room, nonce, part.nacks))
                part.nacks = []
            if part.acks:
                self._send(connection, Ack(room, nonce, part.acks))
                part.acks = []
            if part.complete and not part.done_sent:
                self._finish(connection, part)

    def _finish(self, connection: Connection, part: IncomingPart) -> None:
        transfer = part.transfer
        part.done_sent = True
        self._send(connection, Done(transfer.room, transfer.nonce))
        if not transfer.complete:
            return
        try:
            finished = transfer.state.finish(lambda: self._commit(transfer))
        except TransferError as error:
            self._fail(transfer, str(error))
            return
        if finished:
            self._report(transfer)

    def _commit(self, transfer: IncomingTransfer) -> None:
        assert transfer.metadata is not None
        transfer.store_metadata(transfer.metadata)
        self._on_success(transfer)

    def _report(self, transfer: IncomingTransfer) -> None:
        self._metrics.finished("success")
        seconds = self._now() - transfer.started
        self._metrics.observe("transferring", seconds)
        logger.debug(
            "kvq-zmq: room %d received: %d blocks, %d bytes, %d pages (%d were here), %.3f s",
            transfer.room,
            sum(len(part.received) for part in transfer.parts),
            sum(part.wire_bytes for part in transfer.parts),
            len(transfer.pages),
            transfer.prefix_pages,
            seconds,
        )
