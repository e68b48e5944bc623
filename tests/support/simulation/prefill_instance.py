"""A prefill instance: computes prompts in chunks and hands their pages to its threads."""

from __future__ import annotations

from typing_extensions import override

from sgl_kvq.memory_pool.page_io.span import PageIds
from sgl_kvq.transfer.blocks import Block, cut_pages, cut_rows, metadata_block
from sgl_kvq.transfer.prefill.server import MAX_REFUSED, PrefillThread
from sgl_kvq.transfer.protocol.header import BlockKind
from sgl_kvq.transfer.protocol.messages import Request
from sgl_kvq.transfer.runtime.rank import Rank
from tests.support.simulation.instances import Instance
from tests.support.simulation.network import Path
from tests.support.simulation.pools import NUM_LAYERS, SINK_TOKENS, page_layout
from tests.support.simulation.requests import FAILED, OPEN, REQUESTED, SUCCESS, SideOfRoom
from tests.support.simulation.scenario import WRONG_SOURCES

METADATA_BYTES = 200


class PrefillInstance(Instance):
    """See the module."""

    side = "prefill"

    def endpoint(self, rank: int) -> str:
        return f"tcp://127.0.0.1:{self.port(rank)}"

    def alias(self, rank: int) -> str:
        """A second address of a rank."""
        endpoint = f"tcp://127.0.0.1:{self.port(rank) + 50}"
        self.network.aliases[endpoint] = self.endpoint(rank)
        return endpoint

    @override
    def _make_thread(self, rank: int, ours: Rank) -> PrefillThread:
        return PrefillThread(
            ours,
            rank,
            lambda room, request: self._on_requested(rank, room, request),
            on_success=lambda room: self._on_success(rank, room),
            environment=self.environments[rank],  # type: ignore[arg-type]
        )

    def arrive(self, request: SideOfRoom) -> None:
        """A request comes from the router."""
        number = request.plan.number
        if not self.alive:
            self._note_over(request, FAILED)
            return
        if number in self.by_number or request.plan.fault == "refused":
            for thread in self.threads:
                thread.refuse_room(number, f"room {number} is refused")
            self._note_over(request, FAILED)
            return
        self.by_number[number] = request
        for thread in self.threads:
            state = request.add_state(lambda: self.changed(request))
            thread.open_room(number, state, request.prompt)

    def _on_requested(self, rank: int, number: int, wire_request: Request) -> None:
        request = self.by_number.get(number)
        if request is not None and request.status[rank] == OPEN:
            request.status[rank] = REQUESTED
            request.prefix_pages = wire_request.prefix_pages
            self.changed(request)

    def _on_success(self, rank: int, number: int) -> None:
        request = self.by_number[number]
        request.status[rank] = SUCCESS
        self.world.trace(self.name, f"rank {rank}: success of {number}")
        self.changed(request)

    @override
    def poll(self, request: SideOfRoom) -> None:
        if request.failed:
            self.conclude(request, FAILED)
        elif request.succeeded:
            self.conclude(request, SUCCESS)
        elif request.begun_at is None and self._is_requested(request):
            self._begin(request)

    def _is_requested(self, request: SideOfRoom) -> bool:
        """Whether all ranks may send; one that nobody knows does not hold up the others."""
        unknown_ranks = request.plan.fault in WRONG_SOURCES
        return REQUESTED in request.status if unknown_ranks else OPEN not in request.status

    def _begin(self, request: SideOfRoom) -> None:
        if not self._take_pages(request, request.plan.num_pages, is_first=True):
            self.changed(request)
            return
        for thread in self.threads:
            num_pages = len(request.pages) - request.prefix_pages
            thread.expect_pages(request.plan.number, num_pages)
        self._compute(request, request.prefix_pages)

    def _compute(self, request: SideOfRoom, first: int) -> None:
        """Compute a chunk from a page on, and send it."""
        end = min(first + request.plan.chunk_pages, request.plan.num_pages)
        is_last = end == request.plan.num_pages

        def done() -> None:
            if request.over_at is not None or not self.alive:
                return
            for rank in range(self.tp_size):
                self.pools[rank].fill(request.content, request.pages, first, end)
                if first == request.prefix_pages and first:
                    self.pools[rank].fill(request.content, request.pages, 0, first)
                blocks = self._cut(rank, request, first, end)
                if is_last:
                    blocks.append(metadata_block(bytes(METADATA_BYTES)))
                self.threads[rank].add_blocks(request.plan.number, blocks, is_last)
            if not is_last:
                self._compute(request, end)

        self.environments[0].after(request.plan.chunk_s, done)

    def _cut(self, rank: int, request: SideOfRoom, first: int, end: int) -> list[Block]:
        """As `KvqSender` does."""
        thread, pages = self.threads[rank], request.pages
        block_bytes = thread.block_bytes(request.plan.number)
        num_closed = request.content.closed.shape[1]
        closed: PageIds = pages[first : min(end, num_closed)]
        row_bytes = thread.access.row_bytes(thread.access.heads)
        blocks: list[Block] = []
        if first == 0 and len(closed):
            sizes = (SINK_TOKENS, NUM_LAYERS, row_bytes, block_bytes)
            blocks += cut_rows(BlockKind.SINK_ROWS, pages[:1], *sizes)
        page_bytes = [page_layout(thread.access.heads.count).page_bytes] * NUM_LAYERS
        blocks += cut_pages(first, closed, page_bytes, block_bytes)
        if end > num_closed:
            num_rows = request.content.open_rows.shape[2]
            sizes = (num_rows, NUM_LAYERS, row_bytes, block_bytes)
            blocks += cut_rows(BlockKind.OPEN_ROWS, pages[-1:], *sizes)
        return blocks

    @override
    def _close(self, request: SideOfRoom, rank: int, reason: str) -> None:
        self.threads[rank].close_room(request.plan.number, request.states[rank], reason)

    @override
    def conclude(self, request: SideOfRoom, result: str) -> None:
        if result != SUCCESS and request.begun_at is not None:
            self.network.changed_memory = True
        super().conclude(request, result)

    @override
    def check_round(self, rank: int) -> None:
        for peer in self.threads[rank].peers.values():
            reading = sum(block.nbytes for message in peer.messages for block in message)
            in_flight = sum(
                block.wire_bytes for part in peer.parts for block in part._in_flight.values()
            )
            if peer.bytes_in_flight != reading + in_flight:
                self.world.violate(f"{peer.bytes_in_flight} bytes in flight, {in_flight} known")

    @override
    def paths(self, request: SideOfRoom, rank: int) -> list[Path]:
        decode, router = f"d{request.plan.decode}.", self.network.router(self.endpoint(rank))
        return [
            path
            for path in self.network.paths
            if path.rank.startswith(decode) and self.network.router(path.endpoint) is router
        ]

    @override
    def check_empty(self, rank: int) -> str:
        thread, environment = self.threads[rank], self.environments[rank]
        peers = thread.peers.values()
        held = {
            "rooms": len(thread.rooms),
            "parts": sum(len(peer.parts) for peer in peers),
            "queued": sum(len(peer.round_robin) + len(peer.messages) for peer in peers),
            "in flight": sum(peer.bytes_in_flight for peer in peers),
            "refused": max(0, len(thread._refused) - MAX_REFUSED),
            "sockets": environment.open_sockets - 2,  # it listens, and hears of connections
        }
        return ", ".join(f"{count} {name}" for name, count in held.items() if count)
