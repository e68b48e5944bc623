"""Serving throughput on one machine: stock bf16 and fp8 KV against `--kv-quant`.

Usage: python -m benchmarks.serving [--systems bf16 fp8 hack2 hack4] [--workloads NAME ...]
                                    [--tp N] [--kv-tokens N] [--budget-s S] [--out CSV]

Servers run one after the other, each answers all workloads. Every row is written as soon as it is
known; run again with the same CSV, the command goes on with what is missing. Without `--model` the
servers load random weights of a geometry. Attention backend, page size, prefix cache, CUDA graphs
and scheduling stay SGLang's defaults, and what a server chose is a column; `--server-args` adds to
every server's flags.

On a host with several GPUs run one command a GPU at once, each with its own CUDA_VISIBLE_DEVICES
and `--out`, or servers of `--tp` GPUs; once a CSV holds a workload with 1 and with more GPUs, their
ratio is printed. With `--kv-quant` the pool's metrics are read all along; values that contradict
each other make the exit status 1.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.common.kv_memory import (
    STOCK,
    STOCK_FP8,
    ModelShape,
    calibration_flags,
    server_flags,
)
from benchmarks.common.records import append_csv, command_line, git_commit, read_csv
from benchmarks.common.served import backend_columns
from benchmarks.serving.client import Outcome, run_workload
from benchmarks.serving.counters import PoolWatch
from benchmarks.serving.model_folder import GEOMETRIES, geometry_folder
from benchmarks.serving.workloads import Workload, make_workloads
from testbed.servers import Server, ServerError, hardware_name, launch_server

BF16_TOKENS = 423_494
"""What stock SGLang's bf16 pool holds on an H100 (80 GB) with an 8B model."""
COMMON_FLAGS = "--skip-server-warmup --enable-metrics --random-seed 0"
COMMON_FLAGS += " --mm-feature-transport cpu --sampling-backend pytorch"
MIN_WORKLOAD_S = 20.0
KEY = ("workload", "system", "tp", "input_tokens", "output_tokens", "num_prompts", "kv_tokens")
KEY += ("device", "model")
SHOWN = ("workload", "num_prompts", "system", "tp", "capacity_tokens", "output_tok_s")
SHOWN += (
    "total_tok_s",
    "ttft_p50_s",
    "ttft_p99_s",
    "itl_p50_ms",
    "itl_p99_ms",
    "hit_rate",
    "status",
)


class Bench:
    """The systems and workloads of one invocation.

    Args:
        args: The command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._deadline = time.monotonic() + args.budget_s
        self._model = args.model or geometry_folder(args.geometry, args.layers)
        self._shape = ModelShape.read(self._model)
        known = make_workloads(args.kv_tokens or BF16_TOKENS, args.prompts_per_prefix)
        chosen = [known[name] for name in args.workloads or known]
        limits = args.limit_s or [workload.timeout_s for workload in chosen]
        if len(limits) == 1:
            limits *= len(chosen)
        self._workloads = [
            replace(workload.scaled(args.scale, args.length_scale), timeout_s=limit_s)
            for workload, limit_s in zip(chosen, limits, strict=True)
        ]
        self.problems: list[str] = []
        known_rows = read_csv(args.out)
        if known_rows and "tp" not in known_rows[0]:
            raise SystemExit(
                f"--out: expected a file with a column tp, got {args.out}; name another"
            )
        self._done = {_key(row) for row in known_rows if row["status"] == "ok"}

    def run(self) -> None:
        """Serve each system that has rows missing, until the time budget ends."""
        for system in self._args.systems:
            todo = [
                workload
                for workload in self._workloads
                if _key(self._row(system, workload)) not in self._done
            ]
            if not todo:
                print(f"{system}: every row is in {self._args.out}", flush=True)
            elif self._left_s() < MIN_WORKLOAD_S:
                print(f"{system}: left out, the time budget has ended", flush=True)
            else:
                self._serve(system, todo)

    def _serve(self, system: str, workloads: Sequence[Workload]) -> None:
        """Start one server and send it the workloads; its failure ends only this system."""
        flags = self._server_flags(system)
        print(f"{system}: {shlex.join(flags)}", flush=True)
        log = self._args.out.parent / f"server-{system}-tp{self._args.tp}.log"
        try:
            with launch_server(
                self._model, flags, log, min(300.0, self._left_s()), _import_client
            ) as server:
                served = {"capacity_tokens": server.capacity_tokens(), **backend_columns(server)}
                served["start_s"] = round(server.start_s, 1)
                stated = ", ".join(f"{name} {value}" for name, value in served.items())
                print(f"{system}: {stated}", flush=True)
                for workload in workloads:
                    if self._left_s() < MIN_WORKLOAD_S:
                        print(f"{system}: time budget ended before {workload.name}", flush=True)
                        return
                    self._measure(system, server, served, workload)
        except ServerError as error:
            print(f"{system}: {error}", file=sys.stderr, flush=True)

    def _measure(
        self, system: str, server: Server, served: dict[str, Any], workload: Workload
    ) -> None:
        """Send one workload and write its row."""
        limit_s = min(workload.timeout_s, self._left_s())
        name = f"{system}-tp{self._args.tp}-{workload.name}".replace("/", "-").replace(" ", "-")
        watch = PoolWatch(server, self._args.out.parent / f"{name}.metrics.csv")
        out = self._args.out.parent / name
        outcome = run_workload(server, self._model, workload, out, limit_s, watch.sample)
        self.problems += [f"{system}, {workload.name}: {problem}" for problem in watch.problems]
        row = self._row(system, workload, served, outcome)
        append_csv(self._args.out, row)
        print(tabulate([{key: row[key] for key in SHOWN}], headers="keys"), flush=True)

    def _server_flags(self, system: str) -> list[str]:
        args = self._args
        flags = COMMON_FLAGS.split()
        flags += server_flags(system, self._shape, args.kv_tokens, args.mem_fraction, args.tp)
        flags += calibration_flags(system, args.calibration)
        concurrency = max(workload.concurrency for workload in self._workloads)
        flags += ["--max-running-requests", str(args.max_running or concurrency)]
        if args.model is None:
            flags += ["--load-format", "dummy"]
        return flags + shlex.split(args.server_args)

    def _row(
        self,
        system: str,
        workload: Workload,
        served: dict[str, Any] | None = None,
        outcome: Outcome | None = None,
    ) -> dict[str, Any]:
        """Return a CSV row; the first columns are the results, the rest says how they came."""
        figures = asdict(outcome or Outcome("missing", 0, 0.0))
        status = {key: figures.pop(key) for key in ("status", "completed", "duration_s")}
        rounded = {
            key: None if value is None else round(value, 4) for key, value in figures.items()
        }
        return {
            "workload": workload.name,
            "system": system,
            "tp": self._args.tp,
            **(served or {}),
            **rounded,
            **status,
            "input_tokens": workload.input_tokens + workload.prefix_tokens,
            "output_tokens": workload.output_tokens,
            "concurrency": workload.concurrency,
            "num_prompts": workload.num_prompts,
            "kv_tokens": self._args.kv_tokens,
            "device": hardware_name(),
            "model": self._model.name,
            "sglang": version("sglang"),
            "commit": git_commit(),
            "command": command_line("serving", self._args.argv),
        }

    def _left_s(self) -> float:
        return self._deadline - time.monotonic()


def _import_client(_waited_s: float) -> None:
    """Import the client while the server starts: it takes many seconds, and forks then have it."""
    importlib.import_module("sglang.benchmark.serving")


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    """Return what makes two rows the same measurement."""
    return tuple(str(row[name] or "") for name in KEY)


def tp_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare servers of several GPUs with one of the same system.

    Args:
        rows: Of a results file; the last of equal ones counts.

    Returns:
        A row for each measurement that was made with one GPU, too: how many times the tokens a
        second of one GPU, and the status of both.
    """
    latest = {_key(row): row for row in rows if row["output_tok_s"]}
    ratios = []
    for row in latest.values():
        one = latest.get(_key({**row, "tp": "1"}))
        if one is None or one is row:
            continue
        times = {
            f"{name} over TP 1": round(float(row[name]) / float(one[name]), 3)
            for name in ("output_tok_s", "total_tok_s")
        }
        what = {name: row[name] for name in ("workload", "system", "tp")}
        ratios.append({**what, **times, "status": f"{one['status']}, {row['status']}"})
    return ratios


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `argv` is kept for the CSV."""
    names = list(make_workloads(BF16_TOKENS))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--systems", nargs="+", default=[STOCK, STOCK_FP8, "hack2", "hack4"],
        help="bf16 and fp8 are stock SGLang, any other is a value of --kv-quant")  # fmt: skip
    add("--workloads", nargs="+", choices=names, help=f"default: all of {names}")
    add("--model", type=Path, help="folder with weights, instead of --geometry")
    add("--geometry", choices=list(GEOMETRIES), default="8b", help="of random weights")
    add("--layers", type=int, help="of the random model, for trials (default: all)")
    add("--tp", type=int, default=1, help="GPUs of each server, tensor parallel (default: 1)")
    add("--calibration", type=Path, help="file of bases, for systems that take one")
    add("--kv-tokens", type=int,
        help="bytes of KV memory of each GPU, in bf16 tokens of all KV heads, the same for every "
        "system and --tp, instead of --mem-fraction; also shrinks the shared prefixes")  # fmt: skip
    add(
        "--max-running",
        type=int,
        help="requests a server runs at once (default: the largest concurrency); each takes an "
        "open page of 64 tokens in 16 bits with --kv-quant",
    )
    add("--mem-fraction", type=float, default=0.85, help="default: 0.85")
    add("--prompts-per-prefix", type=int, default=8, help="of shared prefixes (default: 8)")
    add("--limit-s", type=float, nargs="+",
        help="stop a workload so many seconds after its first request; one for all, or one for "
        "each of --workloads")  # fmt: skip
    add("--scale", type=float, default=1.0, help="factor on the number of requests")
    add("--length-scale", type=float, default=1.0, help="factor on lengths")
    add("--server-args", default="", help="further flags of every server, one string")
    add("--budget-s", type=float, default=3600.0, help="start nothing after so many seconds")
    add("--out", type=Path, default=Path("benchmarks/results/h200/serving.csv"))
    args = parser.parse_args(argv)
    args.argv = list(argv)
    if args.limit_s and len(args.limit_s) not in (1, len(args.workloads or names)):
        parser.error("--limit-s: expected one number, or one for each workload")
    return args


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; return the exit status."""
    args = parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    bench.run()
    rows = read_csv(args.out)
    print(tabulate([{key: row[key] for key in SHOWN} for row in rows], headers="keys"))
    if ratios := tp_ratios(rows):
        print(tabulate(ratios, headers="keys"))
    for problem in bench.problems:
        print(f"metrics: {problem}", file=sys.stderr)
    return 0 if rows and not bench.problems else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
