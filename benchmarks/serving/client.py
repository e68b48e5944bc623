"""Run SGLang's `bench_serving` against a server, with a time limit, and read what it found."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving.counters import Counters, quantile
from benchmarks.serving.workloads import Workload
from testbed.servers import Server

SEED = 1
POLL_INTERVAL_S = 0.5
FIRST_REQUEST = "Starting main benchmark run"
"""What `bench_serving` prints when data and warm-up are done."""


@dataclass(frozen=True)
class Outcome:
    """What a workload gave. Figures that are not known are None.

    Attributes:
        status: "ok"; "partial": some requests failed; "timeout": stopped at its limit, rates are
            those of the tokens computed until then and times those of SGLang's own histograms (of
            requests that got so far); "failed": see the log.
        completed: Requests answered.
        duration_s: Of the measured part.
        output_tok_s: Output tokens a second.
        total_tok_s: Prompt tokens (cached or not) and output tokens a second.
        ttft_p50_s: Median time to first token; likewise 99th percentile.
        itl_p50_ms: Median time between tokens; likewise 99th percentile.
        hit_rate: Share of prompt tokens found in the prefix cache.
    """

    status: str
    completed: int
    duration_s: float
    output_tok_s: float | None = None
    total_tok_s: float | None = None
    ttft_p50_s: float | None = None
    ttft_p99_s: float | None = None
    itl_p50_ms: float | None = None
    itl_p99_ms: float | None = None
    hit_rate: float | None = None


def run_workload(
    server: Server,
    model: Path,
    workload: Workload,
    out: Path,
    limit_s: float,
    on_wait: Callable[[], None],
) -> Outcome:
    """Send a workload to an idle server.

    Args:
        server: Started with `--enable-metrics`; its prefix cache is emptied first.
        model: Its folder, for the tokenizer.
        workload: What to send; it is stopped `timeout_s` after its first request.
        out: Prefix of the files for results and output of `bench_serving`.
        limit_s: Limit, start of the client included; the server is idle again afterwards.
        on_wait: Called about twice a second.
    """
    results, log = (out.with_name(out.name + suffix) for suffix in (".jsonl", ".client.log"))
    for path in (results, log):
        path.unlink(missing_ok=True)
    argv = ["--backend", "sglang", "--base-url", server.url, "--model", str(model)]
    argv += ["--output-file", str(results), "--seed", str(SEED), "--cache-report"]
    argv += ["--disable-tqdm", "--flush-cache", *workload.flags()]
    # A fork has SGLang imported already, which takes many seconds, and can be killed.
    client = multiprocessing.get_context("fork").Process(target=_bench_serving, args=(argv, log))
    deadline = time.monotonic() + limit_s
    client.start()
    before, begin = None, time.monotonic()
    while client.is_alive() and time.monotonic() < deadline:
        client.join(POLL_INTERVAL_S)
        if before is None and log.exists() and FIRST_REQUEST in log.read_text(errors="replace"):
            before, begin = Counters.read(server), time.monotonic()
            deadline = min(deadline, begin + workload.timeout_s)
        on_wait()
    elapsed_s = time.monotonic() - begin
    if client.exitcode is None:
        after = Counters.read(server)
        client.kill()
        client.join()
        server.abort_all()
        if before is None:
            return Outcome("failed", 0, elapsed_s)
        return _unfinished(before, after, elapsed_s)
    if client.exitcode or not results.exists():
        return Outcome("failed", 0, elapsed_s)
    return _read(json.loads(results.read_text().splitlines()[-1]), workload)


def _bench_serving(argv: list[str], log: Path) -> None:
    """Body of the forked client."""
    from sglang.benchmark.serving import cli_main

    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # the log says how far it is
    sys.argv = ["bench_serving", *argv]
    cli_main()


def _read(result: dict[str, Any], workload: Workload) -> Outcome:
    """Pick the figures out of a line of `bench_serving`'s results file."""
    cache = result["cache_report"]
    completed = int(result["completed"])
    return Outcome(
        status="ok" if completed == workload.num_prompts else "partial",
        completed=completed,
        duration_s=result["duration"],
        output_tok_s=result["output_throughput"],
        total_tok_s=result["total_throughput"],
        ttft_p50_s=result["median_ttft_ms"] / 1e3,
        ttft_p99_s=result["p99_ttft_ms"] / 1e3,
        itl_p50_ms=result["median_itl_ms"],
        itl_p99_ms=result["p99_itl_ms"],
        hit_rate=cache["total_cached_tokens"] / max(1, cache["total_prompt_tokens"]),
    )


def _unfinished(before: Counters, after: Counters, elapsed_s: float) -> Outcome:
    """Return what the server's own counters say about a workload that was stopped."""
    output, computed, cached = (
        after.tokens[mode] - before.tokens[mode]
        for mode in ("decode", "prefill_compute", "prefill_cache")
    )
    itl = [quantile(before.itl, after.itl, share) for share in (0.5, 0.99)]
    return Outcome(
        status="timeout",
        completed=0,
        duration_s=elapsed_s,
        output_tok_s=output / elapsed_s,
        total_tok_s=(output + computed + cached) / elapsed_s,
        ttft_p50_s=quantile(before.ttft, after.ttft, 0.5),
        ttft_p99_s=quantile(before.ttft, after.ttft, 0.99),
        itl_p50_ms=None if itl[0] is None else itl[0] * 1e3,
        itl_p99_ms=None if itl[1] is None else itl[1] * 1e3,
        hit_rate=cached / max(1.0, cached + computed),
    )
