"""Tasks with right and wrong answers: `--kv-quant` against stock bf16 on the same prompts.

Usage: python -m benchmarks.tasks --model DIR [--systems bf16 kvq2 hack2] [--tasks NAME ...]
                                  [--calibration FILE] [--concurrency N] [--limit N] [--out CSV]

| task | cases | right if |
| --- | --- | --- |
| humaneval | 164 problems in `--wordings` wordings | the program passes the problem's tests |
| copy | 104 functions, each named behind its file of about 5,000 tokens | equal word for word |
| needle-T | 100 numbers in 10 texts of T tokens, one is asked for | the number is right |
| needles-T | 50, four numbers are asked for | all are right |
| json | 100 objects by a schema that stands before 2,000 tokens of text | it parses and validates |

Every system is a server of its own and answers all prompts greedily. Graded answers are written
as they come into a file of JSON lines beside the CSV: run again, the command asks what is missing,
and starts no server for rows that are in the CSV. `bf16`, stock SGLang, is always asked, since
all rows are paired with it. A system is a name and flags of its own, as in
`"kvq2 --kv-quant-prefill quantized"`. The name may end in `#2`: the same server once more, so
`bf16#2` shows what chance changes (batches differ, and with them the last bits of sums). To
measure formats with a file and without, run twice with the same `--out`.

On one GPU with little time, Qwen2.5-Coder-1.5B in seven systems, two servers at a time: one starts
while the other answers. The KV memory of each is 28 GB: a token takes 28 KiB in 16 bits.

    python -m benchmarks.tasks --model qwen2.5-coder-1.5b --calibration kvq.safetensors \
        --systems bf16 hack4 kvq4 kvq2 hack2 kivi2 saw4 --concurrency 128 --kv-tokens 1000000 \
        --at-once 2 --budget-s 550
"""

from __future__ import annotations

import argparse
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.common.kv_memory import STOCK, ModelShape, calibration_flags, server_flags
from benchmarks.common.plot import plot_tasks
from benchmarks.common.records import command_line, git_commit, read_csv, write_csv
from benchmarks.tasks.answers import AnswerFile, Source
from benchmarks.tasks.cases import Grade
from benchmarks.tasks.client import ask_all
from benchmarks.tasks.humaneval import WORDINGS
from benchmarks.tasks.prompts import TASKS, Prompt, make_prompts
from benchmarks.tasks.report import result_columns, table
from testbed.servers import ServerError, dtype_flags, hardware_name, launch_server

COMMON_FLAGS = "--skip-server-warmup --random-seed 0 --mm-feature-transport cpu"
COMMON_FLAGS += " --sampling-backend pytorch --schedule-policy lpm"  # a shared text is read once
NEEDLE_TOKENS = (2048, 4096, 8192, 16384, 32768)
KEY = ("model", "system", "calibration", "task", "n", "device")
START_S = 600.0


class Bench:
    """The systems and prompts of one invocation.

    Args:
        args: The command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        self._args = args
        self._deadline = time.monotonic() + args.budget_s
        self._shape = ModelShape.read(args.model)
        self._prompts = make_prompts(
            args.tasks,
            AutoTokenizer.from_pretrained(args.model),
            self._shape.context_tokens,
            args.wordings,
            args.needle_tokens,
            args.limit,
        )
        self.systems = list(dict.fromkeys([STOCK, *args.systems]))
        self._answers = AnswerFile(args.out.with_suffix(".jsonl"))
        self._rows = {_key(row): row for row in read_csv(args.out)}
        self._lock = threading.Lock()
        self._made_by = {
            "device": hardware_name(),
            "sglang": version("sglang"),
            "commit": git_commit(),
            "command": command_line("tasks", args.argv),
        }

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of the results file, those of other invocations included."""
        return list(self._rows.values())

    def run(self) -> None:
        """Serve each system that has answers missing, until the time budget ends."""
        with ThreadPoolExecutor(self._args.at_once) as pool:
            for _ in pool.map(self._serve, self.systems):
                pass

    def missing(self) -> list[str]:
        """Return the rows that could not be made, each as system and task."""
        return [
            f"{system} {task}"
            for system in self.systems
            for task in self._prompts
            if not self._has_row(system, task)
        ]

    def todo(self, system: str) -> list[Prompt]:
        """Return the prompts a system has to answer: of rows that need it, without an answer."""
        needed_by = self.systems if system == STOCK else [system]
        return [
            prompt
            for task, prompts in self._prompts.items()
            if not all(self._has_row(name, task) for name in needed_by)
            for prompt in prompts
            if self._answers.grade(self._source(system), prompt) is None
        ]

    def _serve(self, system: str) -> None:
        """Start one server and ask it; its failure ends only this system."""
        todo = self.todo(system)
        left_s = self._deadline - time.monotonic()
        if todo and left_s > 0:
            flags = self._server_flags(system)
            print(f"{system}: {len(todo)} prompts, {shlex.join(flags)}", flush=True)
            log = self._args.out.parent / f"server-{re.sub('[^a-z0-9#.]+', '-', system)}.log"
            try:
                with launch_server(self._args.model, flags, log, min(START_S, left_s)) as server:
                    begin = time.monotonic()
                    self._ask(system, server.url, todo)
                    asked_s = time.monotonic() - begin
                    took = f"started in {server.start_s:.0f} s, asked for {asked_s:.0f} s"
                    print(f"{system}: {took}", flush=True)
            except ServerError as error:
                print(f"{system}: {error}", file=sys.stderr, flush=True)
        if left := len(self.todo(system)):
            print(f"{system}: {left} prompts have no answer; run the command again", flush=True)
        self._write_rows()

    def _ask(self, system: str, url: str, todo: Sequence[Prompt]) -> None:
        """Ask until the deadline and keep what is answered."""
        source = self._source(system)
        made_by = {name: self._made_by[name] for name in ("sglang", "commit")}

        def keep(prompt: Prompt, grade: Grade, reply: dict[str, Any]) -> None:
            meta = reply["meta_info"]
            counted = {name: meta[name] for name in ("completion_tokens", "cached_tokens")}
            counted["finish_reason"] = meta["finish_reason"]["type"]
            self._answers.add(source, prompt, grade, **counted, **made_by, answer=reply["text"])

        ask_all(url, todo, self._args.concurrency, self._deadline - time.monotonic(), keep)

    def _write_rows(self) -> None:
        """Write the rows whose answers, and bf16's, are all there."""
        with self._lock:
            for system in self.systems:
                for task, prompts in self._prompts.items():
                    grades = [self._answers.grade(self._source(system), p) for p in prompts]
                    reference = [self._answers.grade(self._source(STOCK), p) for p in prompts]
                    if self._has_row(system, task) or None in grades or None in reference:
                        continue
                    row = self._identity(system, task) | result_columns(prompts, grades, reference)
                    if system == STOCK:  # is the reference
                        row |= dict.fromkeys(("low", "high", "p"), "")
                    row |= self._made_by
                    self._rows[_key(row)] = row
            if self._rows:
                write_csv(self._args.out, self.rows)

    def _has_row(self, system: str, task: str) -> bool:
        row = self._identity(system, task) | {"n": len(self._prompts[task]), **self._made_by}
        return _key(row) in self._rows

    def _identity(self, system: str, task: str) -> dict[str, Any]:
        source = asdict(self._source(system))
        return {name: source[name] for name in ("model", "system", "calibration")} | {"task": task}

    def _source(self, system: str) -> Source:
        args = self._args
        takes_file = calibration_flags(_name_and_flags(system)[0], args.calibration)
        calibration = args.calibration.name if takes_file else ""
        return Source(args.model.name, system, calibration, self._made_by["device"])

    def _server_flags(self, system: str) -> list[str]:
        args = self._args
        name, own_flags = _name_and_flags(system)
        flags = [*COMMON_FLAGS.split(), *dtype_flags()]
        flags += server_flags(name, self._shape, args.kv_tokens, args.mem_fraction)
        flags += calibration_flags(name, args.calibration)
        flags += ["--max-running-requests", str(args.concurrency)]
        return [*flags, *shlex.split(args.server_args), *own_flags]


def _name_and_flags(system: str) -> tuple[str, list[str]]:
    """Split a system of the command line; what distinguishes repetitions is left out."""
    name, *flags = shlex.split(system)
    return name.partition("#")[0], flags


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    """Return what makes two rows the same measurement."""
    return tuple(str(row[name]) for name in KEY)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `argv` is kept for the CSV."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="Hugging Face folder")
    add("--systems", nargs="+", default=["kvq4", "kvq2"], metavar="SYSTEM",
        help="bf16 and fp8 are stock SGLang, any other is a value of --kv-quant; flags may "
        "follow in the same word")  # fmt: skip
    add("--tasks", nargs="+", choices=TASKS, default=TASKS, help="default: all")
    add("--calibration", type=Path, help="file of bases, for systems that take one")
    add("--wordings", type=int, choices=range(1, len(WORDINGS) + 1), default=len(WORDINGS),
        help="of HumanEval's question (default: 3)")  # fmt: skip
    add("--needle-tokens", type=int, nargs="+", default=NEEDLE_TOKENS,
        help="lengths of texts, those the model takes (default: 2048 to 32768)")  # fmt: skip
    add("--limit", type=int, help="cases of each row, for trials")
    add("--concurrency", type=int, default=64, help="requests in flight (default: 64)")
    add("--at-once", type=int, default=1, help="servers at the same time (default: 1)")
    add("--kv-tokens", type=int,
        help="bytes of KV memory, in bf16 tokens, instead of --mem-fraction")  # fmt: skip
    add("--mem-fraction", type=float, default=0.85, help="default: 0.85")
    add("--server-args", default="", help="further flags of every server, one string")
    add("--budget-s", type=float, default=3600.0, help="ask nothing after so many seconds")
    add("--out", type=Path, default=Path("benchmarks/results/tasks.csv"))
    args = parser.parse_args(argv)
    args.argv = list(argv)
    return args


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; return the exit status."""
    args = parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        bench = Bench(args)
    except (OSError, ValueError) as error:
        print(f"tasks: {error}", file=sys.stderr)
        return 1
    bench.run()
    if bench.rows:
        print(table(bench.rows))
        plot_tasks(read_csv(args.out), args.out.with_suffix(".png"))
    missing = bench.missing()
    if missing:
        print(f"without a row: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # answers are written, servers die with us
    sys.exit(main(sys.argv[1:]))
