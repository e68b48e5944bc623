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
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import zmq

from benchmarks.records import command_line, git_commit, write_csv
from benchmarks.servers import cpu_name, free_port
from benchmarks.wire_ends import EndSpec, WirePair, wire_pair

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


def _receive_bare(endpoint: str) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.ROUTING_ID, b"bare")
        socket.rcvhwm = 0
        socket.connect(endpoint)
        socket.send(b"ready")
        while len(socket.recv_multipart(copy=False)) == 3:
            socket.send(b"a")  # as ours, an acknowledgement a block


def time_bare(block_bytes: int, count: int) -> float:
    """Seconds the bare loop takes for `count` blocks."""
    payload = memoryview(bytearray(block_bytes))
    in_flight = max(1, WINDOW_BYTES // block_bytes)
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    # Forked before this process has any ZeroMQ context; a spawned one would import for seconds.
    receiver = multiprocessing.get_context("fork").Process(target=_receive_bare, args=(endpoint,))
    receiver.start()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.sndhwm = 0
        socket.bind(endpoint)
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
        receiver.join(10)
    return seconds


def measure(pair: WirePair, block_kb: int, repeats: int, command: str) -> Row:
    """Measure one block size; the first round warms up."""
    ours, bare = [], []
    for _ in range(repeats + 1):
        ours.append(pair.total_bytes / pair.transfer(block_kb * 1024))
        mean_bytes = pair.total_bytes // pair.num_blocks
        bare.append(mean_bytes * pair.num_blocks / time_bare(mean_bytes, pair.num_blocks))
    mine, theirs = (statistics.median(speeds[1:]) / 1e6 for speeds in (ours, bare))
    return Row(
        block_bytes=mean_bytes,
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
    with wire_pair(EndSpec("hack2", NUM_PAGES, WINDOW_BYTES)) as pair:
        for block_kb in BLOCK_KB:
            rows.append(measure(pair, block_kb, args.repeats, command))
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
