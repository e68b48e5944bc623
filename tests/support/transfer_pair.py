"""Two pools with the two ends of the wire between them, in this process, over real sockets."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from sgl_kvq.config import KVQuantConfig
from sgl_kvq.formats.base import PAGE_SIZE, QuantFormat
from sgl_kvq.formats.families.kvq import kvq_format
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.registry import get_format
from sgl_kvq.memory_pool.capacity import PoolPlan
from sgl_kvq.memory_pool.page_io.factory import open_pool
from sgl_kvq.memory_pool.page_io.span import HeadRange
from sgl_kvq.memory_pool.sinks import SinkPages
from sgl_kvq.memory_pool.slots import SlotTable
from sgl_kvq.memory_pool.store import PagedStore
from sgl_kvq.transfer.blocks import Block, cut_pages, cut_rows, heads_of_rank, metadata_block
from sgl_kvq.transfer.decode.assembly import IncomingTransfer
from sgl_kvq.transfer.decode.client import DecodeThread
from sgl_kvq.transfer.decode.connections import ConnectionState
from sgl_kvq.transfer.options import TransferConfig
from sgl_kvq.transfer.prefill.server import PrefillThread
from sgl_kvq.transfer.protocol.handshake import make_fingerprint
from sgl_kvq.transfer.protocol.header import BlockKind
from sgl_kvq.transfer.protocol.prompt import describe_prompt
from sgl_kvq.transfer.runtime.rank import Rank
from sgl_kvq.transfer.runtime.request_state import RequestState
from tests.support.sink_rows import give_sink_rows

NUM_LAYERS = 3
NUM_HEADS = 4
SINK_TOKENS = 4
METADATA = bytes(range(200))


def pair_formats(name: str) -> list[QuantFormat]:
    """Formats of the layers; "chosen" is what a calibrated file may choose, kvq2 otherwise."""
    if name != "chosen":
        return [get_format(name)] * NUM_LAYERS
    return [kvq_format("kvq2", 2, 2, 2), kvq_format("kvq2", 2, 2, 2), kvq_format("kvq2", 4, 2, 4)]


def make_pool(
    format_name: str = "hack2",
    heads: int = NUM_HEADS,
    num_pages: int = 64,
    seed: int | None = None,
    device: str = "cpu",
) -> PagedStore:
    """A pool of random bytes; without a seed every byte is 0xEE, so that any write shows."""
    layouts = tuple(PageLayout(fmt, 64, heads) for fmt in pair_formats(format_name))
    pool = PagedStore(PoolPlan(layouts, SINK_TOKENS, num_pages, 8), device=device)
    generator = torch.Generator().manual_seed(seed or 0)
    for layer in pool.layers:
        for part in (layer.pages, layer.open_rows, layer.sink_rows):
            data = part.view(torch.uint8)
            if seed is None:
                data.fill_(0xEE)
            else:
                data.copy_(torch.randint(0, 256, data.shape, generator=generator))
    return pool


def fingerprint(pool: PagedStore, format_name: str = "hack2", weights: str = "same") -> Any:
    config = KVQuantConfig(pool.layout.format.name, sink_tokens=SINK_TOKENS)
    return make_fingerprint(config, pool.plan.layouts, NUM_HEADS, weights)


@dataclass
class Outcome:
    """What became of one side of a transfer."""

    result: str = ""
    reason: str = ""
    state: RequestState = field(init=False)

    def __post_init__(self) -> None:
        self.state = RequestState(self._fail)

    def _fail(self, reason: str) -> None:
        self.result, self.reason = "failed", reason


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "condition did not become true"
        time.sleep(0.005)


def transfer_threads() -> list[str]:
    """Names of ours: pyzmq has one of its own, once it has sent a block."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("kvq-")]


class PrefillSide:
    """A prefill rank: a pool with random content and its thread."""

    def __init__(
        self,
        config: TransferConfig,
        tp: tuple[int, int] = (1, 0),
        weights: str = "same",
        format_name: str = "hack2",
        seed: int = 1,
        device: str = "cpu",
    ) -> None:
        self.heads = heads_of_rank(NUM_HEADS, *tp)
        self.pool = make_pool(format_name, self.heads.count, seed=seed, device=device)
        self.config = config
        self.outcomes: dict[int, Outcome] = {}
        self.requested: list[int] = []
        self.thread = PrefillThread(
            Rank(
                config,
                open_pool(self.pool, self.heads),
                fingerprint(self.pool, format_name, weights),
                secrets.randbits(64),
            ),
            on_requested=lambda room, request: self.requested.append(room),
            on_success=self._success,
        )
        self.thread.start()

    @property
    def endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.thread.port}"

    def _success(self, room: int) -> None:
        self.outcomes[room].result = "success"

    def open(self, room: int, token_ids: Sequence[int] = (), weights: str = "") -> Outcome:
        self.outcomes[room] = Outcome()
        prompt = describe_prompt(token_ids, weights)
        self.thread.open_room(room, self.outcomes[room].state, prompt)
        return self.outcomes[room]

    def send(self, room: int, pages: torch.Tensor, num_tokens: int, first_page: int = 0) -> None:
        """Send a whole prompt at once; `pages` holds those from `first_page` on."""
        self.thread.expect_pages(room, len(pages))
        places = pages.numpy()
        num_rows = num_tokens % PAGE_SIZE
        closed = places[:-1] if num_rows and len(places) else places
        row_bytes = self.thread.access.row_bytes(self.heads)
        block_bytes = self.thread.block_bytes(room)
        sizes = (NUM_LAYERS, row_bytes, block_bytes)
        blocks: list[Block] = []
        if first_page == 0 and len(closed):
            blocks += cut_rows(BlockKind.SINK_ROWS, places[:1], SINK_TOKENS, *sizes)
        page_bytes = [layout.page_bytes for layout in self.pool.plan.layouts]
        blocks += cut_pages(first_page, closed, page_bytes, block_bytes)
        if num_rows and len(places):
            blocks += cut_rows(BlockKind.OPEN_ROWS, places[-1:], num_rows, *sizes)
        blocks.append(metadata_block(METADATA))
        self.thread.add_blocks(room, blocks, True)

    def close(self, room: int, reason: str | None = None) -> None:
        self.thread.close_room(room, self.outcomes[room].state, reason)


class DecodeSide:
    """A decode rank: an untouched pool and its thread."""

    def __init__(
        self,
        config: TransferConfig,
        tp: tuple[int, int] = (1, 0),
        weights: str = "same",
        format_name: str = "hack2",
        device: str = "cpu",
    ) -> None:
        self.heads = heads_of_rank(NUM_HEADS, *tp)
        self.pool = make_pool(format_name, self.heads.count, device=device)
        self.outcomes: dict[int, Outcome] = {}
        self.metadata: dict[int, bytes] = {}
        self.nonces: dict[int, int] = {}
        self.endpoints: dict[int, list[str]] = {}
        self.thread = DecodeThread(
            Rank(
                config,
                open_pool(self.pool, self.heads),
                fingerprint(self.pool, format_name, weights),
                secrets.randbits(64),
            ),
            on_success=self._success,
        )
        self.thread.start()

    def _success(self, transfer: IncomingTransfer) -> None:
        self.outcomes[transfer.room].result = "success"

    def announce(self, room: int, endpoints: list[str]) -> Outcome:
        self.outcomes[room] = Outcome()
        self.nonces[room] = secrets.randbits(64)
        self.endpoints[room] = endpoints
        state = self.outcomes[room].state
        self.thread.announce(endpoints, room, self.nonces[room], state)
        return self.outcomes[room]

    def wait_ready(self, endpoint: str) -> None:
        wait_for(lambda: self.thread.connection_state(endpoint)[0] is ConnectionState.READY)

    def start(
        self,
        room: int,
        pages: torch.Tensor,
        prefix_pages: int = 0,
        peers: int = 1,
        token_ids: Sequence[int] = (),
        weights: str = "",
    ) -> None:
        """Ask for a prompt; `pages` holds those that are not here."""
        transfer = IncomingTransfer(
            room,
            self.nonces[room],
            self.outcomes[room].state,
            prefix_pages,
            pages.numpy(),
            self.thread.access.fence(),
            describe_prompt(token_ids, weights),
            lambda data: self.metadata.__setitem__(room, data),
        )
        self.thread.start_transfer(transfer, self.endpoints[room], peers)

    def close(self, room: int, reason: str | None = None) -> None:
        state, nonce = self.outcomes[room].state, self.nonces[room]
        self.thread.close_room(self.endpoints[room], room, nonce, state, reason)


def take_pages(pool: PagedStore, num_tokens: int, first: int) -> torch.Tensor:
    """Pages from `first` on in shuffled order, with the slots the allocator would give them."""
    count = -(-num_tokens // PAGE_SIZE)
    pages = first + torch.randperm(count)
    if num_tokens % PAGE_SIZE:
        pool.open_slots.acquire(pages[-1:].to(pool.device))
    give_sink_rows(pool, pages[:1])
    return pages


def assert_equal(
    source: PrefillSide, sent: torch.Tensor, target: DecodeSide, got: torch.Tensor, num_tokens: int
) -> None:
    """Closed pages, open rows and sink rows of the shared heads are the same bytes."""
    common: HeadRange = source.heads.intersect(target.heads)
    ours, theirs = common.within(source.heads), common.within(target.heads)
    num_rows = num_tokens % PAGE_SIZE
    closed = slice(0, len(sent) - 1 if num_rows else len(sent))
    layers = zip(source.pool.layers, target.pool.layers, source.pool.plan.layouts, strict=True)
    for mine, other, layout in layers:
        width = layout.head_bytes
        assert torch.equal(
            mine.pages[sent[closed], ours.start * width : ours.stop * width].cpu(),
            other.pages[got[closed], theirs.start * width : theirs.stop * width].cpu(),
        )
        if num_rows:
            a = mine.open_rows[held(source.pool.open_slots, sent[-1:]), :, :num_rows, ours]
            b = other.open_rows[held(target.pool.open_slots, got[-1:]), :, :num_rows, theirs]
            assert torch.equal(a.cpu().view(torch.int16), b.cpu().view(torch.int16))
        if num_tokens >= PAGE_SIZE:
            a = mine.sink_rows[held(source.pool.sink_pages, sent[:1]), :, :, ours]
            b = other.sink_rows[held(target.pool.sink_pages, got[:1]), :, :, theirs]
            assert torch.equal(a.cpu().view(torch.int16), b.cpu().view(torch.int16))


def held(table: SlotTable | SinkPages, page: torch.Tensor) -> int:
    """Slot or row that a page (int64 [1]) holds."""
    return int(table.held_slot(page.to(table.step_view().device)))


def ship(
    prefill: PrefillSide, decode: DecodeSide, room: int, num_tokens: int, first: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """One whole transfer; returns the pages on both sides."""
    sent = take_pages(prefill.pool, num_tokens, first)
    got = take_pages(decode.pool, num_tokens, first + 20)
    out = prefill.open(room)
    result = decode.announce(room, [prefill.endpoint])
    decode.start(room, got)
    prefill.send(room, sent, num_tokens)
    wait_for(lambda: bool(out.result and result.result))
    assert (out.result, result.result) == ("success", "success"), (out.reason, result.reason)
    prefill.close(room)
    decode.close(room)
    return sent, got


@contextmanager
def stopped(*sides: PrefillSide | DecodeSide) -> Iterator[None]:
    """Stop the threads at the end, whatever happens."""
    try:
        yield
    finally:
        for side in sides:
            side.thread.stop()
