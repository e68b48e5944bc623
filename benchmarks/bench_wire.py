"""Loopback speed of block transfers against a bare pyzmq loop with the same block sizes.

Usage: python -m benchmarks.bench_wire [--repeats 5] [--helpers N ...] [--out FILE.csv]

Two processes on one machine. Ours reads every block from a pool of 264 MB, its pages in random
order, hashes it, sends it, hashes it again and writes it to another pool, checksums on. The bare
loop (`benchmarks.bare_wire`) does nothing with a block and has the same window; `bare` sends one
block's memory again and again, `bare_cold` walks over as much memory as ours. Each repeat measures
everything one after the other, the first round warms up, rows give medians. `share` is ours to
`bare`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.bare_wire import BareLoop, bare_loop
from benchmarks.records import command_line, git_commit, write_csv
from benchmarks.servers import cpu_name
from benchmarks.wire_ends import EndSpec, WirePair, wire_pair
from sgl_kvq.transfer.helpers import default_helpers

NUM_PAGES = 192
BLOCK_KB = (64, 256, 1024, 4096)
WINDOW_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Row:
    """One block size; field names are the columns."""

    block_bytes: int
    helpers: int
    ours_mb_s: float
    bare_mb_s: float
    bare_cold_mb_s: float
    share: float
    share_of_cold: float
    repeats: int
    machine: str
    commit: str
    command: str


def measure(
    pairs: dict[int, WirePair], bare: BareLoop, block_kb: int, repeats: int, command: str
) -> list[Row]:
    """Measure one block size, with every number of helpers."""
    speeds: list[dict[Any, float]] = []
    for _ in range(repeats + 1):
        speed: dict[Any, float] = {}
        for helpers, pair in pairs.items():
            speed[helpers] = pair.total_bytes / pair.transfer(block_kb * 1024)
            count, total_bytes = pair.num_blocks, pair.total_bytes
        mean_bytes = total_bytes // count
        sent = mean_bytes * count
        speed["bare"] = sent / bare.transfer(mean_bytes, count)
        speed["cold"] = sent / bare.transfer(mean_bytes, count, total_bytes)
        speeds.append(speed)
    medians = {key: statistics.median(speed[key] for speed in speeds[1:]) for key in speeds[0]}
    return [
        Row(
            block_bytes=mean_bytes,
            helpers=helpers,
            ours_mb_s=round(medians[helpers] / 1e6, 1),
            bare_mb_s=round(medians["bare"] / 1e6, 1),
            bare_cold_mb_s=round(medians["cold"] / 1e6, 1),
            share=round(medians[helpers] / medians["bare"], 3),
            share_of_cold=round(medians[helpers] / medians["cold"], 3),
            repeats=repeats,
            machine=cpu_name(),
            commit=git_commit(),
            command=command,
        )
        for helpers in pairs
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all sizes and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--helpers",
        type=int,
        nargs="+",
        default=[default_helpers()],
        help="threads at each end that copy and hash (%(default)s here)",
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu/wire.csv"))
    args = parser.parse_args(argv)
    command = command_line("bench_wire", sys.argv[1:] if argv is None else argv)
    rows: list[Row] = []
    with bare_loop(WINDOW_BYTES) as bare, ExitStack() as ends:
        specs = [EndSpec("hack2", NUM_PAGES, WINDOW_BYTES, helpers=n) for n in args.helpers]
        pairs = {spec.helpers: ends.enter_context(wire_pair(spec)) for spec in specs}
        for block_kb in BLOCK_KB:
            fresh = measure(pairs, bare, block_kb, args.repeats, command)
            rows += fresh
            write_csv(args.out, [asdict(row) for row in rows])
            for row in fresh:
                print(
                    f"{row.block_bytes / 1024:7.0f} KiB  {row.helpers} helpers  "
                    f"ours {row.ours_mb_s:7.0f} MB/s  "
                    f"bare {row.bare_mb_s:7.0f} MB/s  {row.share:.0%}  "
                    f"bare, cold {row.bare_cold_mb_s:7.0f} MB/s  {row.share_of_cold:.0%}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
