"""Run SGLang's `bench_serving` against a server, with a time limit, and read what it found."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.servers import Server
from benchmarks.serving.workloads import Workload

TOKENS = "sglang:realtime_tokens_total"
SEED = 1


@dataclass(frozen=True)
class Outcome:
    """What a workload gave. Figures that are not known are None.

    Attributes:
        status: "ok"; "partial": some requests failed; "timeout": stopped at its limit, rates are
            those of the tokens computed until then; "failed": see the log.
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
    server: Server, model: Path, workload: Workload, out: Path, timeout_s: float
) -> Outcome:
    """Send a workload to an idle server.

    Args:
        server: Started with `--enable-metrics`; its prefix cache is emptied first.
        model: Its folder, for the tokenizer.
        workload: What to send.
        out: Prefix of the files for results and output of `bench_serving`.
        timeout_s: Limit, start of the client included; the server is idle again afterwards.
    """
    results, log = (out.with_name(out.name + suffix) for suffix in (".jsonl", ".client.log"))
    results.unlink(missing_ok=True)
    argv = ["--backend", "sglang", "--base-url", server.url, "--model", str(model)]
    argv += ["--output-file", str(results), "--seed", str(SEED), "--cache-report"]
    argv += ["--disable-tqdm", "--flush-cache", *workload.flags()]
    before = _tokens(server)
    begin = time.monotonic()
    # A fork has SGLang imported already, which takes many seconds, and can be killed.
    client = multiprocessing.get_context("fork").Process(target=_bench_serving, args=(argv, log))
    client.start()
    client.join(timeout_s)
    elapsed_s = time.monotonic() - begin
    if client.exitcode is None:
        client.kill()
        client.join()
        outcome = _unfinished(server, before, elapsed_s)
        server.abort_all()
        return outcome
    if client.exitcode or not results.exists():
        return Outcome("failed", 0, elapsed_s)
    return _read(json.loads(results.read_text().splitlines()[-1]), workload)


def _bench_serving(argv: list[str], log: Path) -> None:
    """Body of the forked client."""
    from sglang.benchmark.serving import cli_main

    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
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


def _unfinished(server: Server, before: dict[str, float], elapsed_s: float) -> Outcome:
    """Return what the server's own counters say about a workload that was stopped."""
    after = _tokens(server)
    output, computed, cached = (
        after[mode] - before[mode] for mode in ("decode", "prefill_compute", "prefill_cache")
    )
    return Outcome(
        status="timeout",
        completed=0,
        duration_s=elapsed_s,
        output_tok_s=output / elapsed_s,
        total_tok_s=(output + computed + cached) / elapsed_s,
        hit_rate=cached / max(1.0, cached + computed),
    )


def _tokens(server: Server) -> dict[str, float]:
    """Return the tokens a server handled so far, by `mode`."""
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    counts: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == TOKENS:
                counts[sample.labels["mode"]] += sample.value
    return counts
