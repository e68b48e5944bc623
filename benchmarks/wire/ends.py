"""The two ends of a transfer as processes, with pools of an 8B model's geometry and no model."""

from __future__ import annotations

import multiprocessing
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pd.tun_link import enter_namespace
from sgl_kvq.config import KVQuantConfig
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.registry import get_format
from sgl_kvq.memory_pool.capacity import PoolPlan
from sgl_kvq.memory_pool.page_io.base import PoolAccess
from sgl_kvq.memory_pool.page_io.factory import open_pool
from sgl_kvq.memory_pool.page_io.span import HeadRange, PageIds
from sgl_kvq.memory_pool.store import PagedStore
from sgl_kvq.transfer.blocks import cut_pages, metadata_block
from sgl_kvq.transfer.decode.assembly import IncomingTransfer
from sgl_kvq.transfer.decode.client import DecodeThread
from sgl_kvq.transfer.decode.connections import ConnectionState
from sgl_kvq.transfer.options import TransferConfig, default_workers
from sgl_kvq.transfer.prefill.server import PrefillThread
from sgl_kvq.transfer.protocol.handshake import make_fingerprint
from sgl_kvq.transfer.protocol.prompt import describe_prompt
from sgl_kvq.transfer.runtime.rank import Rank
from sgl_kvq.transfer.runtime.request_state import RequestState

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 32, 8, 128  # Llama-3.1-8B


@dataclass(frozen=True)
class EndSpec:
    """What a pair of ends is made of.

    Attributes:
        format: Name of the format of the pages.
        num_pages: Pages of a transfer.
        window_bytes: Unacknowledged bytes.
        host: Address the sending end listens on.
        keys: Folder of CURVE keys, or None on loopback.
        sender_namespace: Network namespace of the sending end, None for this one.
        workers: Threads beside each end's transfer thread.
    """

    format: str
    num_pages: int
    window_bytes: int = 32 * 2**20
    host: str = "127.0.0.1"
    keys: Path | None = None
    sender_namespace: str | None = None
    workers: int = field(default_factory=default_workers)

    def config(self) -> TransferConfig:
        """Options of either end."""
        return TransferConfig(
            host=self.host,
            keys=self.keys,
            window_bytes=self.window_bytes,
            deadline_s=120,
            workers=self.workers,
        )


def _make_side(spec: EndSpec) -> tuple[PagedStore, PoolAccess, Any]:
    layout = PageLayout(get_format(spec.format), HEAD_DIM, NUM_HEADS)
    plan = PoolPlan((layout,) * NUM_LAYERS, 4, spec.num_pages, 1)
    pool = PagedStore(plan, device="cpu")
    for layer in pool.layers:
        layer.pages.random_(0, 256)
    config = KVQuantConfig(spec.format)
    marks = make_fingerprint(config, pool.plan.layouts, NUM_HEADS, "benchmark")
    return pool, open_pool(pool, HeadRange(0, NUM_HEADS)), marks


def _send_end(pipe: Any, spec: EndSpec) -> None:
    if spec.sender_namespace is not None:
        enter_namespace(f"/var/run/netns/{spec.sender_namespace}")  # before any socket is there
    pool, access, marks = _make_side(spec)
    requested, done = threading.Event(), threading.Event()
    thread = PrefillThread(
        Rank(spec.config(), access, marks, secrets.randbits(64)),
        on_requested=lambda room, request: requested.set(),
        on_success=lambda room: done.set(),
    )
    thread.start()
    page_bytes = pool.layout.page_bytes
    pages = _shuffled(spec.num_pages)
    pipe.send(f"tcp://{spec.host}:{thread.port}")
    while (order := pipe.recv()) is not None:
        room, block_bytes = order
        layers = [page_bytes] * NUM_LAYERS
        first = 1 if room == 1 else 0  # a connection begins with small blocks
        blocks = list(cut_pages(0, pages[:first], layers, page_bytes))
        blocks += cut_pages(first, pages[first:], layers, block_bytes)
        last = metadata_block(bytes(2048))
        requested.clear()
        done.clear()
        thread.open_room(room, RequestState(print), describe_prompt(()))
        requested.wait()
        began = time.perf_counter()
        thread.add_blocks(room, [*blocks, last], True)
        done.wait()
        pipe.send((time.perf_counter() - began, len(blocks)))
    thread.stop()


def _shuffled(num_pages: int) -> PageIds:
    """Pages of a pool in random order: the worst case, no two of them follow each other."""
    return np.random.default_rng(0).permutation(num_pages).astype(np.int64) + 1


def _receive_end(pipe: Any, spec: EndSpec) -> None:
    _, access, marks = _make_side(spec)
    thread = DecodeThread(Rank(spec.config(), access, marks, secrets.randbits(64)))
    thread.start()
    pages = _shuffled(spec.num_pages)
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        room, endpoint = order
        state, done = RequestState(print), threading.Event()
        thread.announce([endpoint], room, room, state)
        while thread.connection_state(endpoint)[0] is not ConnectionState.READY:
            time.sleep(0.01)

        def finish(data: bytes, done: threading.Event = done) -> None:
            done.set()

        transfer = IncomingTransfer(room, room, state, 0, pages, [], describe_prompt(()), finish)
        thread.start_transfer(transfer, [endpoint], 1)
        done.wait()
        thread.close_room([endpoint], room, room, state, None)
    thread.stop()


class WirePair:
    """Both ends, started; `transfer` times one transfer of all pages.

    Attributes:
        total_bytes: Bytes of all pages.
        num_blocks: Blocks of the last transfer.
    """

    def __init__(self, sender: Any, receiver: Any, spec: EndSpec) -> None:
        self._sender, self._receiver = sender, receiver
        self._endpoint = sender.recv()
        receiver.recv()
        layout = PageLayout(get_format(spec.format), HEAD_DIM, NUM_HEADS)
        self.total_bytes = spec.num_pages * NUM_LAYERS * layout.page_bytes
        self.num_blocks = 0
        self._room = 0

    def transfer(self, block_bytes: int) -> float:
        """Seconds from the first block to the receiver's last answer.

        Args:
            block_bytes: Size a block is filled up to.
        """
        self._room += 1
        self._sender.send((self._room, block_bytes))
        self._receiver.send((self._room, self._endpoint))
        seconds, self.num_blocks = self._sender.recv()
        return float(seconds)


@contextmanager
def wire_pair(spec: EndSpec) -> Iterator[WirePair]:
    """Start both ends and stop them at exit."""
    context = multiprocessing.get_context("spawn")
    ends = []
    for target in (_send_end, _receive_end):
        near, far = context.Pipe()
        process = context.Process(target=target, args=(far, spec), daemon=True)
        process.start()
        ends.append((near, process))
    try:
        yield WirePair(ends[0][0], ends[1][0], spec)
    finally:
        for near, process in ends:
            if process.is_alive():
                near.send(None)
            process.join(10)
            process.kill()
