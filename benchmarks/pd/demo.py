"""Prefill and decode apart: the agents of the demo behind SGLang's router, bf16 against hack2.

Usage: python -m benchmarks.pd.demo [--model DIR] [--out out] [--formats bf16 hack2]

Starts a prefill instance, a decode instance and the router for each format, lets the agents of
`benchmarks.agents.sessions` work, and reads from the prefill instance's metrics what went over the
wire.
One server of the same format that does both then scores the answers as the demo does: the share
of their tokens that it would have chosen at the same place. Prints a table, writes `demo_pd.json`.
A CPU without bfloat16 instructions computes in float32; what is cached and shipped stays the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.agents.sessions import Request, Workload, WorkloadSizes
from benchmarks.common.records import git_commit
from scripts.fetch_model import DEFAULT_FOLDER, fetch
from testbed.pd_cluster import START_TIMEOUT_S, launch_pd, launch_router, transfer_metrics
from testbed.servers import ServerError, dtype_flags, hardware_name, launch_server

SIZES = WorkloadSizes(
    num_agents=4, num_rounds=2, shared_tokens=512, private_tokens=1024, answer_tokens=12
)
MEMORY_GB = 0.25
FLAGS = ["--kv-quant-memory-gb", str(MEMORY_GB), "--max-running-requests", "4"]
FLAGS += ["--chunked-prefill-size", "512", "--random-seed", "0", "--enable-cache-report"]


@dataclass(frozen=True)
class Run:
    """Measurements of one format; the field names are the keys in `demo_pd.json`."""

    format: str
    wire_bytes: int
    wire_bytes_per_token: float
    closed_page_bytes_per_token: float
    ratio_to_bf16: float | None
    ttft_p50_s: float
    jct_mean_s: float
    agreement_with_colocated: float
    agreement_tokens: int
    agreement_cached_share: float
    transfers: int


def run_format(model: Path, out: Path, kv_format: str, console: Console) -> Run:
    """Serve one format apart, then in one server, with the same agents."""
    from transformers import AutoTokenizer

    workload = Workload(AutoTokenizer.from_pretrained(model), SIZES)
    flags = ["--kv-quant", kv_format, *FLAGS, *dtype_flags()]
    folder = out / f"pd-{kv_format}"
    console.rule(f"[bold]{kv_format}")
    decode_flags = ["--disaggregation-decode-enable-radix-cache"]

    def report(request: Request) -> None:
        console.print(
            f"round {request.round_index + 1} agent {request.agent_index}: "
            f"{request.prompt_tokens:5,} prompt tokens, first token {request.ttft_s:5.2f} s, "
            f"total {request.total_s:5.2f} s",
            highlight=False,
        )

    with (
        launch_pd(
            model, [*flags, "--enable-metrics"], folder, decode_flags=decode_flags
        ) as cluster,
        launch_router(cluster, folder / "router.log") as router,
    ):
        console.print(f"prefill, decode and router ready: {router.url}")
        answers = workload.run(router, report, flush=False)
        metrics = transfer_metrics(cluster.prefill)
    with launch_server(model, flags, folder / "colocated.log", START_TIMEOUT_S) as server:
        console.print("scoring the answers with one server, teacher-forced")
        scored = workload.score_agreement(server, answers)
    prefix = "sgl_kvq:transfer_wire_bytes_total"
    wire_bytes = int(sum(value for name, value in metrics.items() if name.startswith(prefix)))
    pages = metrics[f"{prefix}:pages"] + metrics[f"{prefix}:header"]
    return Run(
        format=kv_format,
        wire_bytes=wire_bytes,
        wire_bytes_per_token=wire_bytes / sum(request.prompt_tokens for request in answers),
        closed_page_bytes_per_token=pages / metrics["sgl_kvq:transfer_closed_page_tokens_total"],
        ratio_to_bf16=None,
        ttft_p50_s=statistics.median(request.ttft_s for request in answers),
        jct_mean_s=statistics.mean(request.total_s for request in answers),
        agreement_with_colocated=scored.share,
        agreement_tokens=scored.num_tokens,
        agreement_cached_share=scored.cached_share,
        transfers=int(metrics["sgl_kvq:transfer_transfers_total:success"]),
    )


def with_ratios(runs: Sequence[Run]) -> list[Run]:
    """Add the bytes relative to the bf16 run, if there is one."""
    baseline = next((run.wire_bytes for run in runs if run.format == "bf16"), None)
    if baseline is None:
        return list(runs)
    return [Run(**(asdict(run) | {"ratio_to_bf16": run.wire_bytes / baseline})) for run in runs]


def results_table(runs: Sequence[Run]) -> Table:
    """The one table of the demo."""
    table = Table(title="Prefill and decode apart, same agents")
    columns = ("format", "MB on the wire", "bytes/ prompt token", "bytes/ closed-page token")
    for name in (*columns, "of bf16", "TTFT p50 s", "mean JCT s", "agreement with one server"):
        table.add_column(name, justify="left" if name == "format" else "right")
    for run in runs:
        table.add_row(
            run.format,
            f"{run.wire_bytes / 1e6:,.1f}",
            f"{run.wire_bytes_per_token:,.0f}",
            f"{run.closed_page_bytes_per_token:,.0f}",
            "-" if run.ratio_to_bf16 is None else f"{run.ratio_to_bf16:.1%}",
            f"{run.ttft_p50_s:.2f}",
            f"{run.jct_mean_s:.2f}",
            f"{run.agreement_with_colocated:.1%}",
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help=f"Hugging Face folder ({DEFAULT_FOLDER})")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    parser.add_argument("--formats", nargs="+", default=["bf16", "hack2"])
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        model = args.model or fetch(DEFAULT_FOLDER)
        args.out.mkdir(parents=True, exist_ok=True)
        runs = with_ratios([run_format(model, args.out, name, console) for name in args.formats])
    except (ServerError, OSError, ValueError) as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    console.print(results_table(runs))
    result = {
        "model": str(model),
        "device": hardware_name(),
        "sglang_version": version("sglang"),
        "router_version": version("sglang-router"),
        "sizes": asdict(SIZES),
        "dtype_flags": dtype_flags(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "runs": [asdict(run) for run in runs],
    }
    path = args.out / "demo_pd.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"{path} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
