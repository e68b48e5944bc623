"""An agent's turn: a few fresh tokens behind a long cached context, alone and beside others.

Usage: python -m benchmarks.serving.step [--systems bf16 fp8 kvq2 hack2] [--geometries 8b 1.5b]
                                         [--fresh N ...] [--cached N ...] [--running N ...]
                                         [--budget-s S] [--profile FRESH CACHED] [--out CSV]

A prompt of `cached` tokens is put into the radix cache, then turns of `fresh` further tokens come,
one after the other, while `running` requests decode. Rows hold the time to a turn's first token and
the time between tokens: of the other requests while the turns arrive, or of the turns themselves
when nothing else runs. A turn that does not find exactly `cached` tokens in the cache fails its row
and the command.

Stock SGLang runs with its own choice of attention backend and prefill CUDA graph for the device;
both are columns, read from the running server. All servers get the same bytes of KV memory, random
weights of the geometry, and greedy sampling. Servers run one after the other; cases are measured in
the order of the arguments until a server's time budget ends, and every row is written at once. Run
again with the same CSV, the command goes on with what is missing.

`--profile` also traces one prefill step on the idle server, last, and writes beside the CSV where
its time goes: host, launches, kernels, idle.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from benchmarks.common.kv_memory import STOCK, STOCK_FP8, ModelShape, kv_flags, system_flags
from benchmarks.common.records import append_csv, command_line, git_commit, read_csv
from benchmarks.common.served import backend_columns
from benchmarks.serving.model_folder import GEOMETRIES, geometry_folder
from benchmarks.serving.step_client import (
    Case,
    CaseError,
    Prompts,
    Times,
    generate_payload,
    measure,
    put_prefix,
)
from benchmarks.serving.step_profile import longest_kernels, profile_step, read_trace, record_trace
from sgl_kvq.formats.base import PAGE_SIZE
from testbed.servers import (
    Server,
    ServerError,
    dtype_flags,
    hardware_name,
    launch_server,
)

COMMON_FLAGS = "--skip-server-warmup --skip-tokenizer-init --random-seed 0"
COMMON_FLAGS += " --mm-feature-transport cpu --sampling-backend pytorch"
MIN_CASE_S = 5.0
PROFILE_S = 20.0
"""Time kept back for `--profile`."""
KEY = ("geometry", "system", "fresh", "cached", "running", "device")


@dataclass(frozen=True)
class Running:
    """A running server and what its rows share.

    Attributes:
        server: Healthy.
        model: Its folder.
        deadline: When its time budget ends, in seconds of `time.monotonic`.
        columns: Of each of its rows: what was served, and how.
    """

    server: Server
    model: Path
    deadline: float
    columns: dict[str, Any]

    def left_s(self) -> float:
        """Return the seconds left of the budget."""
        return self.deadline - time.monotonic()


class Bench:
    """The geometries, systems and cases of one invocation.

    Args:
        args: The command line.

    Attributes:
        problems: Cases that measured something else than what was meant.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._device = hardware_name()
        self._done = {_key(row) for row in read_csv(args.out)}
        self.problems: list[str] = []

    def run(self) -> None:
        """Serve each geometry by each system that has rows missing."""
        for geometry, model in self._models():
            for system in self._args.systems:
                todo = [case for case in self._cases() if not self._is_done(geometry, system, case)]
                if todo or self._args.profile:
                    self._serve(geometry, model, system, todo)

    def _models(self) -> Iterator[tuple[str, Path]]:
        if self._args.model:
            yield self._args.model.name, self._args.model
            return
        for name in self._args.geometries:
            yield name, geometry_folder(name, self._args.layers)

    def _cases(self) -> list[Case]:
        args = self._args
        orders = product(args.cached, args.running, args.fresh)
        return [Case(fresh, cached, running) for cached, running, fresh in orders]

    def _is_done(self, geometry: str, system: str, case: Case) -> bool:
        key = {"geometry": geometry, "system": system, "device": self._device, **asdict(case)}
        return _key(key) in self._done

    def _serve(self, geometry: str, model: Path, system: str, cases: Sequence[Case]) -> None:
        """Start one server and measure the cases; its failure ends only this system."""
        flags = self._server_flags(model, system)
        print(f"{geometry}, {system}: {shlex.join(flags)}", flush=True)
        log = self._args.out.parent / f"server-{geometry}-{system}.log"
        deadline = time.monotonic() + self._args.budget_s
        try:
            with launch_server(model, flags, log, self._args.budget_s) as server:
                columns = self._columns(geometry, system, model, server)
                print(f"ready in {server.start_s:.0f} s; {_stated(columns)}", flush=True)
                running = Running(server, model, deadline, columns)
                self._measure_all(running, cases)
                if self._args.profile:
                    self._profile(running, *self._args.profile)
        except ServerError as error:
            self.problems.append(f"{geometry}, {system}: {error}")
            print(self.problems[-1], file=sys.stderr, flush=True)

    def _server_flags(self, model: Path, system: str) -> list[str]:
        args, shape = self._args, ModelShape.read(model)
        flags = [*COMMON_FLAGS.split(), *dtype_flags(), *system_flags(system)]
        flags += kv_flags(system, args.kv_tokens * shape.bytes_per_token, shape)
        flags += ["--max-running-requests", str(max(args.running) + 1)]
        flags += ["--load-format", "dummy"] * (args.model is None)
        return flags + shlex.split(args.server_args)

    def _measure_all(self, running: Running, cases: Sequence[Case]) -> None:
        """Measure cases of one cached prefix after another, until the time budget ends."""
        kept_s = MIN_CASE_S + (PROFILE_S if self._args.profile else 0.0)
        prompts = Prompts(self._args.background_tokens)
        in_cache, prefix = None, list[int]()
        for case in cases:
            if running.left_s() < kept_s:
                print(f"time budget ended before {case}", flush=True)
                return
            if case.cached != in_cache:
                in_cache, prefix = case.cached, prompts.take(case.cached)
                put_prefix(running.server, prefix, running.left_s())
            try:
                repetitions, left_s = self._args.repetitions, running.left_s()
                times = measure(running.server, case, prefix, prompts, repetitions, left_s)
            except CaseError as error:
                self.problems.append(f"{_stated(running.columns)}: {error}")
                print(self.problems[-1], file=sys.stderr, flush=True)
            else:
                self._write(running, case, times)

    def _write(self, running: Running, case: Case, times: Times) -> None:
        """Write the row of a case."""
        columns = dict(running.columns)
        what = {name: columns.pop(name) for name in ("geometry", "system")}
        row = {**what, **asdict(case), **summarize(times), **columns}
        append_csv(self._args.out, row)
        shown = {name: row[name] for name in (*what, *asdict(case), *summarize(times))}
        print("  ".join(f"{name} {value}" for name, value in shown.items()), flush=True)

    def _profile(self, running: Running, fresh: int, cached: int) -> None:
        """Trace one turn on the idle server and write where its prefill step's time went."""
        prompts = Prompts(self._args.background_tokens)
        prefix = prompts.take(cached)
        put_prefix(running.server, prefix, running.left_s())
        measure(running.server, Case(fresh, cached, 0), prefix, prompts, 2, running.left_s())
        payload = generate_payload([*prefix, *prompts.take(fresh)], 2, stream=False)
        folder = self._args.out.parent / "traces"
        trace = record_trace(running.server, payload, folder)
        name = "{geometry}-{system}.trace.json.gz".format(**running.columns)
        events = read_trace(trace.rename(folder / name))
        figures = {k: round(v, 3) for k, v in asdict(profile_step(events)).items()}
        columns = dict(running.columns)
        what = {name: columns.pop(name) for name in ("geometry", "system")}
        what |= {"fresh": fresh, "cached": cached}
        append_csv(
            self._args.out.with_stem(f"{self._args.out.stem}_profile"),
            {**what, **figures, **columns},
        )
        print(tabulate([{**what, **figures}], headers="keys"), flush=True)
        print(tabulate(longest_kernels(events, 12), headers="keys"), flush=True)

    def _columns(self, geometry: str, system: str, model: Path, server: Server) -> dict[str, Any]:
        """Return the columns that all rows of a server share."""
        return {
            "geometry": geometry,
            "system": system,
            **backend_columns(server),
            "repetitions": self._args.repetitions,
            "capacity_tokens": server.capacity_tokens(),
            "kv_tokens": self._args.kv_tokens,
            "start_s": round(server.start_s, 1),
            "device": self._device,
            "model": model.name,
            "sglang": version("sglang"),
            "torch": version("torch"),
            "commit": git_commit(),
            "command": command_line("serving.step", self._args.argv),
        }


def summarize(times: Times) -> dict[str, float | None]:
    """Return the figures of a row; None where nothing was measured."""
    return {
        f"{name}_p{share}": round(float(np.percentile(values, share)), 3) if values else None
        for name, values in asdict(times).items()
        for share in (50, 99)
    }


def _stated(columns: dict[str, Any]) -> str:
    names = ("geometry", "system", "attention_backend", "prefill_graph", "capacity_tokens")
    return ", ".join(f"{name} {columns[name]}" for name in names)


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    """Return what makes two rows the same measurement."""
    return tuple(str(row[name]) for name in KEY)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `argv` is kept for the CSV."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--systems", nargs="+", default=[STOCK, STOCK_FP8, "kvq2", "hack2"],
        help="bf16 and fp8 are stock SGLang, any other is a value of --kv-quant")  # fmt: skip
    add("--geometries", nargs="+", choices=list(GEOMETRIES), default=["8b", "1.5b"])
    add("--model", type=Path, help="folder with weights, instead of --geometries")
    add("--layers", type=int, help="of the random models, for trials (default: all)")
    add("--fresh", type=int, nargs="+", default=[16, 64, 128, 512, 2048], help="tokens of a turn")
    add("--cached", type=int, nargs="+", default=[0, 4096, 32768, 102400],
        help=f"tokens before them in the cache, multiples of {PAGE_SIZE}")  # fmt: skip
    add("--running", type=int, nargs="+", default=[0, 8, 32], help="other requests that decode")
    add("--repetitions", type=int, default=8, help="turns of a case (default: 8)")
    add("--background-tokens", type=int, default=1024, help="context of the others (default: 1024)")
    add("--kv-tokens", type=int, default=400_000,
        help="bytes of KV memory for every server, in bf16 tokens (default: 400,000)")  # fmt: skip
    add("--profile", type=int, nargs=2, metavar=("FRESH", "CACHED"), help="trace this step, too")
    add("--server-args", default="", help="further flags of every server, one string")
    add("--budget-s", type=float, default=600.0, help="of each server, its start included")
    add("--out", type=Path, default=Path("benchmarks/results/h200/step.csv"))
    args = parser.parse_args(argv)
    args.argv = list(argv)
    if any(tokens % PAGE_SIZE for tokens in args.cached):
        parser.error(f"--cached: expected multiples of {PAGE_SIZE}, got {args.cached}")
    return args


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; return the exit status."""
    args = parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    bench.run()
    for problem in bench.problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if bench.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
