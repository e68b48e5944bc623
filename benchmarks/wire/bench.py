"""Loopback speed of block transfers against a bare pyzmq loop with the same block sizes.

Usage: python -m benchmarks.wire.bench [--repeats 5] [--workers N] [--out FILE.csv]

Two processes on one machine. Ours reads every block from a pool of 264 MB, its pages in random
order, hashes it, sends it, hashes it again and writes it to another pool, checksums on. The bare
loop (`benchmarks.wire.bare`) does nothing with a block and has the same window; `bare` sends one
block's memory again and again, `bare_cold` walks over as much memory as ours. Each repeat measures
all three one after the other, the first round warms up, rows give medians. `share` is ours to
`bare`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common.records import command_line, git_commit, write_csv
from benchmarks.wire.bare import BareLoop, bare_loop
from benchmarks.wire.ends import EndSpec, WirePair, wire_pair
from sgl_kvq.transfer.options import default_workers
from testbed.servers import cpu_name

NUM_PAGES = 192
BLOCK_KB = (64, 256, 1024, 4096)
WINDOW_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Row:
    """One block size; field names are the columns."""

    block_bytes: int
    workers: int
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
    pair: WirePair, bare: BareLoop, block_kb: int, workers: int, repeats: int, command: str
) -> Row:
    """Measure one block size."""
    speeds: list[tuple[float, float, float]] = []
    for _ in range(repeats + 1):
        ours = pair.total_bytes / pair.transfer(block_kb * 1024)
        count = pair.num_blocks
        mean_bytes = pair.total_bytes // count
        sent = mean_bytes * count
        hot = sent / bare.transfer(mean_bytes, count)
        cold = sent / bare.transfer(mean_bytes, count, pair.total_bytes)
        speeds.append((ours, hot, cold))
    ours, hot, cold = (statistics.median(column) / 1e6 for column in zip(*speeds[1:], strict=True))
    return Row(
        block_bytes=mean_bytes,
        workers=workers,
        ours_mb_s=round(ours, 1),
        bare_mb_s=round(hot, 1),
        bare_cold_mb_s=round(cold, 1),
        share=round(ours / hot, 3),
        share_of_cold=round(ours / cold, 3),
        repeats=repeats,
        machine=cpu_name(),
        commit=git_commit(),
        command=command,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all sizes and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--workers",
        type=int,
        default=default_workers(),
        help="threads at each end that copy and hash (%(default)s here)",
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu/wire.csv"))
    args = parser.parse_args(argv)
    command = command_line("wire.bench", sys.argv[1:] if argv is None else argv)
    rows = []
    spec = EndSpec("hack2", NUM_PAGES, WINDOW_BYTES, workers=args.workers)
    with bare_loop(WINDOW_BYTES) as bare, wire_pair(spec) as pair:
        for block_kb in BLOCK_KB:
            row = measure(pair, bare, block_kb, args.workers, args.repeats, command)
            rows.append(row)
            write_csv(args.out, [asdict(row) for row in rows])
            print(
                f"{row.block_bytes / 1024:7.0f} KiB  ours {row.ours_mb_s:7.0f} MB/s  "
                f"bare {row.bare_mb_s:7.0f} MB/s  {row.share:.0%}  "
                f"bare, cold {row.bare_cold_mb_s:7.0f} MB/s  {row.share_of_cold:.0%}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
