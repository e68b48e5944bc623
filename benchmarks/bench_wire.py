"""Loopback speed of block transfers against a bare pyzmq loop with the same block sizes.

Usage: python -m benchmarks.bench_wire [--repeats 5] [--out benchmarks/results/cpu/wire.csv]

Two processes on one machine. The bare loop sends one prepared buffer over and over (ROUTER to
DEALER, multipart, zero-copy on both sides, nothing done with it). Ours reads every block from a
pool, hashes it, sends it, hashes it again and writes it to another pool, checksums on. Both are
measured in turns; rows give the median.
"""

from __future__ import annotations

import argparse
import multiprocessing
import secrets
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import zmq

from benchmarks.records import command_line, git_commit, write_csv
from benchmarks.servers import cpu_name
from sgl_kvq.config import KVQuantConfig
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.registry import get_format
from sgl_kvq.memory_pool.capacity import PoolPlan
from sgl_kvq.memory_pool.quantized_pool import QuantizedKVPool
from sgl_kvq.transfer.blocks import Block, HeadRange, PoolAccess, cut_pages
from sgl_kvq.transfer.decode_link import DecodeThread, LinkState
from sgl_kvq.transfer.handshake import make_fingerprint
from sgl_kvq.transfer.inbound import InTransfer
from sgl_kvq.transfer.options import TransferConfig
from sgl_kvq.transfer.prefill_link import PrefillThread
from sgl_kvq.transfer.thread import Ticket
from sgl_kvq.transfer.wire import BlockKind

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 32, 8, 128  # Llama-3.1-8B
NUM_PAGES = 192
BLOCK_KB = (64, 256, 1024, 4096)
WINDOW_BYTES = 32 * 2**20
HEADER = bytes(80)


@dataclass(frozen=True)
class Row:
    """One block size; field names are the columns."""

    block_bytes: int
    ours_mb_s: float
    bare_mb_s: float
    share: float
    repeats: int
    machine: str
    commit: str
    command: str


def make_side() -> tuple[QuantizedKVPool, PoolAccess, Any]:
    """A pool of 8B geometry, access to it and its fingerprint."""
    layout = PageLayout(get_format("hack2"), HEAD_DIM, NUM_HEADS)
    pool = QuantizedKVPool(PoolPlan(layout, NUM_LAYERS, 4, NUM_PAGES, 1), device="cpu")
    for layer in pool.layers:
        layer.pages.random_(0, 256)
    marks = make_fingerprint(KVQuantConfig("hack2"), layout, NUM_LAYERS, NUM_HEADS, "bench")
    return pool, PoolAccess(pool, HeadRange(0, NUM_HEADS)), marks


def receive(orders: Any, block_bytes: int) -> None:
    """The receiving process: ours for each (room, endpoint), the bare loop for each endpoint."""
    _, access, marks = make_side()
    config = TransferConfig(block_bytes=block_bytes, window_bytes=WINDOW_BYTES)
    thread = DecodeThread(config, access, marks, secrets.randbits(64))
    thread.start()
    zero = torch.zeros(1, dtype=torch.int64)
    pages = torch.arange(1, NUM_PAGES + 1)
    while (order := orders.recv()) is not None:
        kind, room, endpoint = order
        if kind == "bare":
            _receive_bare(endpoint)
            continue
        ticket, done = Ticket(print), threading.Event()
        thread.announce([endpoint], room, room, ticket)
        while thread.link_state(endpoint)[0] is not LinkState.READY:
            time.sleep(0.01)
        transfer = InTransfer(room, room, ticket, 0, pages, zero, zero, lambda data: done.set())  # noqa: B023
        thread.start_transfer(transfer, [endpoint], 1)
        done.wait()
        thread.close_room([endpoint], room, room, ticket, None)
    thread.stop()


def _receive_bare(endpoint: str) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.ROUTING_ID, b"bare")
        socket.rcvhwm = 0
        socket.connect(endpoint)
        socket.send(b"ready")
        while len(socket.recv_multipart(copy=False)) == 3:
            socket.send(b"a")  # as ours, an acknowledgement a block


def send_bare(orders: Any, block_bytes: int, count: int) -> float:
    """Seconds the bare loop takes for `count` blocks."""
    payload = memoryview(bytearray(block_bytes))
    in_flight = max(1, WINDOW_BYTES // block_bytes)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.sndhwm = 0
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        orders.send(("bare", 0, f"tcp://127.0.0.1:{port}"))
        identity, _ = socket.recv_multipart()
        began = time.perf_counter()
        sent = acknowledged = 0
        while acknowledged < count:
            while sent < count and sent - acknowledged < in_flight:
                socket.send_multipart([identity, b"B", HEADER, payload], copy=False)
                sent += 1
            socket.recv_multipart()
            acknowledged += 1
            while acknowledged < sent and socket.poll(0):
                socket.recv_multipart()
                acknowledged += 1
        seconds = time.perf_counter() - began
        socket.send_multipart([identity, b"end"])
        time.sleep(0.05)
    return seconds


class Sender:
    """Ours: a prefill rank whose transfers are timed from the first block to the last answer."""

    def __init__(self, block_bytes: int) -> None:
        pool, access, marks = make_side()
        config = TransferConfig(block_bytes=block_bytes, window_bytes=WINDOW_BYTES)
        self._asked, self._done = threading.Event(), threading.Event()
        self.thread = PrefillThread(
            config,
            access,
            marks,
            secrets.randbits(64),
            on_asked=lambda room, request: self._asked.set(),
            on_success=lambda room: self._done.set(),
        )
        self.thread.start()
        pages = torch.randperm(NUM_PAGES) + 1
        page_bytes = pool.layout.page_bytes
        self.blocks = list(cut_pages(0, pages, NUM_LAYERS, page_bytes, block_bytes))
        self.block_bytes = self.blocks[0].num_layers * len(self.blocks[0].pages) * page_bytes
        self.total_bytes = NUM_PAGES * NUM_LAYERS * page_bytes

    def send(self, orders: Any, room: int) -> float:
        """Seconds one transfer takes."""
        self._asked.clear()
        self._done.clear()
        self.thread.open_room(room, Ticket(print))
        orders.send(("ours", room, f"tcp://127.0.0.1:{self.thread.port}"))
        self._asked.wait()
        began = time.perf_counter()
        last = Block(BlockKind.METADATA, data=bytes(2048))
        self.thread.add_blocks(room, [*self.blocks, last], True)
        self._done.wait()
        return time.perf_counter() - began


def measure(block_kb: int, repeats: int, command: str) -> Row:
    """Measure one block size."""
    context = multiprocessing.get_context("spawn")
    orders, far = context.Pipe()
    process = context.Process(target=receive, args=(far, block_kb * 1024), daemon=True)
    process.start()
    sender = Sender(block_kb * 1024)
    ours, bare = [], []
    for room in range(1, repeats + 2):
        ours.append(sender.total_bytes / sender.send(orders, room))
        count = len(sender.blocks)
        bare.append(count * sender.block_bytes / send_bare(orders, sender.block_bytes, count))
    orders.send(None)
    process.join(10)
    sender.thread.stop()
    mine, theirs = (statistics.median(speeds[1:]) / 1e6 for speeds in (ours, bare))
    return Row(
        block_bytes=sender.block_bytes,
        ours_mb_s=round(mine, 1),
        bare_mb_s=round(theirs, 1),
        share=round(mine / theirs, 3),
        repeats=repeats,
        machine=cpu_name(),
        commit=git_commit(),
        command=command,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all sizes and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu/wire.csv"))
    args = parser.parse_args(argv)
    command = command_line("bench_wire", sys.argv[1:] if argv is None else argv)
    rows = []
    for block_kb in BLOCK_KB:
        rows.append(measure(block_kb, args.repeats, command))
        row = rows[-1]
        print(
            f"{row.block_bytes / 1024:7.0f} KiB  ours {row.ours_mb_s:7.0f} MB/s  "
            f"bare {row.bare_mb_s:7.0f} MB/s  {row.share:.0%}",
            flush=True,
        )
    write_csv(args.out, [asdict(row) for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
