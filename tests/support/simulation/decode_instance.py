"""A decode instance: announces requests, allocates pages, asks for them, checks what arrived."""

from __future__ import annotations

from typing_extensions import override

from sgl_kvq.memory_pool.page_io.span import HeadRange
from sgl_kvq.transfer.decode.assembly import IncomingTransfer
from sgl_kvq.transfer.decode.client import MAX_FINISHED, DecodeThread
from sgl_kvq.transfer.decode.connections import ConnectionState
from sgl_kvq.transfer.runtime.rank import Rank
from tests.support.simulation.instances import Instance
from tests.support.simulation.network import Path
from tests.support.simulation.prefill_instance import PrefillInstance
from tests.support.simulation.requests import FAILED, SUCCESS, SideOfRoom

WAITING_S = 0.1
"""Between two looks at requests without pages."""


class DecodeInstance(Instance):
    """See the module."""

    side = "decode"
    prefill: list[PrefillInstance]

    @override
    def _make_thread(self, rank: int, ours: Rank) -> DecodeThread:
        return DecodeThread(
            ours,
            lambda transfer: self._on_success(rank, transfer),
            environment=self.environments[rank],  # type: ignore[arg-type]
        )

    @override
    def start(self) -> None:
        super().start()
        self._look()

    def sources(self, rank: int, prefill: PrefillInstance) -> list[int]:
        """Prefill ranks of a decode rank, as SGLang chooses them."""
        if prefill.tp_size >= self.tp_size:
            ratio = prefill.tp_size // self.tp_size
            return list(range(rank * ratio, (rank + 1) * ratio))
        return [rank * prefill.tp_size // self.tp_size]

    def _endpoints(self, rank: int, request: SideOfRoom) -> list[str]:
        prefill = self.prefill[request.plan.prefill]
        ranks = self.sources(rank, prefill)
        endpoints = [prefill.endpoint(source) for source in ranks]
        if request.plan.fault == "missing rank" and rank == 0:
            return endpoints[1:]
        if request.plan.fault == "rank twice" and rank == 0:
            return [*endpoints[1:], endpoints[0], prefill.alias(ranks[0])]
        if request.plan.fault == "rank instead" and rank == 0:
            return [endpoints[0], prefill.alias(ranks[0]), *endpoints[2:]]
        return endpoints

    def arrive(self, request: SideOfRoom) -> None:
        """A request comes from the router."""
        number = request.plan.number
        if not self.alive or number in self.by_number:
            self._note_over(request, FAILED)
            return
        self.by_number[number] = request
        for rank, thread in enumerate(self.threads):
            state = request.add_state(lambda: self.changed(request))
            request.nonces.append(self.world.rng.getrandbits(64))
            request.endpoints.append(self._endpoints(rank, request))
            thread.announce(request.endpoints[rank], number, request.nonces[rank], state)

    def _look(self) -> None:
        """Begin requests whose prefill ranks are ready, while pages are free."""
        for request in list(self.by_number.values()):
            if request.begun_at is None and not request.failed:
                if not self._are_ready(request):
                    continue
                if not self._begin(request):
                    break
        self.environments[0].after(WAITING_S, self._look)

    def _are_ready(self, request: SideOfRoom) -> bool:
        for rank, endpoints in enumerate(request.endpoints):
            for endpoint in endpoints:
                state, reason = self.threads[rank].connection_state(endpoint)
                if state is ConnectionState.REFUSED:
                    request.states[rank].fail(reason)
                if state is not ConnectionState.READY:
                    return False
        return True

    def _begin(self, request: SideOfRoom) -> bool:
        prefix = request.prefix_pages = request.plan.prefix_pages
        if not self._take_pages(request, request.plan.num_pages - prefix, is_first=prefix == 0):
            return False
        tp_size = self.prefill[request.plan.prefill].tp_size
        for rank, thread in enumerate(self.threads):
            transfer = IncomingTransfer(
                request.plan.number,
                request.nonces[rank],
                request.states[rank],
                prefix,
                request.pages,
                [],
                request.prompt,
                lambda data: None,
            )
            request.transfers.append(transfer)
            peers = max(1, self.tp_size // tp_size)
            thread.start_transfer(transfer, request.endpoints[rank], peers)
        return True

    def _on_success(self, rank: int, transfer: IncomingTransfer) -> None:
        request = self.by_number[transfer.room]
        self.world.trace(self.name, f"rank {rank}: success of {transfer.room}")
        request.status[rank] = SUCCESS
        if request.plan.fault in ("prompt", "weights"):
            self.world.violate(f"success although the {request.plan.fault} differ")
        else:
            self._check(rank, request)
        self.changed(request)

    def _check(self, rank: int, request: SideOfRoom) -> None:
        """Every byte of a rank's heads is the prefill's."""
        self.check_heads(rank, request, self.heads(rank))

    def check_heads(self, rank: int, request: SideOfRoom, heads: HeadRange) -> None:
        pool = self.pools[rank]
        wrong = pool.check(request.content, request.pages, request.prefix_pages, heads)
        if wrong:
            self.world.violate(f"success of {request.plan.number}, but {wrong} of {heads} differ")

    @override
    def poll(self, request: SideOfRoom) -> None:
        if request.failed:
            self.conclude(request, FAILED)
        elif request.succeeded:
            for rank in range(self.tp_size):
                self._check(rank, request)
            self.conclude(request, SUCCESS)

    @override
    def _close(self, request: SideOfRoom, rank: int, reason: str) -> None:
        plan = request.plan
        self.threads[rank].close_room(
            request.endpoints[rank], plan.number, request.nonces[rank], request.states[rank], reason
        )

    @override
    def paths(self, request: SideOfRoom, rank: int) -> list[Path]:
        parts = request.transfers[rank].parts if request.transfers else []
        done = {part.source.endpoint for part in parts if part.done_sent and part.source}
        return [
            self.network.path(f"{self.name}.{rank}", endpoint)
            for endpoint in request.endpoints[rank]
            if endpoint not in done
        ]

    @override
    def check_empty(self, rank: int) -> str:
        thread, environment = self.threads[rank], self.environments[rank]
        connections = thread.connections.values()
        held = {
            "rooms": sum(len(c.waiting) + len(c.parts) for c in connections),
            "blocks": sum(len(c.blocks) for c in connections),
            "finished": sum(max(0, len(c.finished) - MAX_FINISHED) for c in connections),
            "sockets": environment.open_sockets - 2 * len(connections),
        }
        return ", ".join(f"{count} {name}" for name, count in held.items() if count)
