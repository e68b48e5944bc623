"""Timing of GPU kernels: CUDA graphs, cold L2 cache, systems in turn."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.records import command_line, git_commit, write_csv

COLD_BYTES = 320 * 2**20  # several times the L2 cache of any GPU
MAX_COPIES = 32


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


def num_copies(read_bytes: int) -> int:
    """Copies of the input to rotate among, so that no call finds its data in the L2 cache."""
    return max(2, min(MAX_COPIES, -(-COLD_BYTES // max(1, read_bytes))))


def capture(call: Callable[[int], Any], copies: int) -> torch.cuda.CUDAGraph:
    """Capture one call on each copy of the input in a CUDA graph."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            call(copy)
    return graph


def time_interleaved(
    calls: dict[str, Callable[[int], Any]], copies: int, rounds: int = 25
) -> dict[str, Timing]:
    """Time several systems in turn (A, B, C, A, ...), each as a CUDA graph over all copies.

    Args:
        calls: By name, a function of the copy to work on.
        copies: Of the input.
        rounds: Replays of each graph; three more come first as a warm-up.
    """
    graphs = {name: capture(call, copies) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 3):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 3:
                times[name].append(begin.elapsed_time(end) * 1e3 / copies)
    return {name: _percentiles(values) for name, values in times.items()}


def _percentiles(values: Sequence[float]) -> Timing:
    fifths = statistics.quantiles(values, n=5)
    return Timing(fifths[0], statistics.median(values), fifths[3])


def copy_gbps() -> float:
    """Bytes read and written a second by a plain copy kernel of 1 GiB, in GB/s."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    timing = time_interleaved({"copy": lambda _: torch.mul(source, 1.5, out=target)}, 2)["copy"]
    return 2 * source.nbytes / timing.p50 / 1e3


def environment() -> dict[str, str]:
    """What a result depends on besides its shape."""

    def known(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "none"

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": known("triton"),
        "flashinfer": known("flashinfer-python"),
        "commit": git_commit(),
        "command": command_line(f"kernels.{Path(sys.argv[0]).stem}", sys.argv[1:]),
    }


def write_results(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows with the environment as their last columns."""
    environ = environment()
    write_csv(path, [row | environ for row in rows])
