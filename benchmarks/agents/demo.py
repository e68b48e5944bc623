"""The product in a few minutes: many agents, little KV memory, stock bf16 against `--kv-quant`.

Usage: python -m benchmarks.agents.demo [--model DIR] [--out out] [--formats bf16 hack4 hack2]
                                 [--kv-memory-gb X]

Serves one model several times, one server after the other, with the same bytes of KV memory and
the same flags: first stock SGLang with its 16-bit cache, then `--kv-quant FORMAT`. Each server
answers the same agents (`benchmarks.agents.sessions`), whose transcripts together are about four
times what the 16-bit cache holds. Prints one table and writes `demo.json` and `demo.png`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.agents.sessions import QUESTION_TOKENS, Request, Workload, WorkloadSizes, summarize
from benchmarks.common.kv_memory import PAGE_SIZE, STOCK, ModelShape, kv_flags, system_flags
from benchmarks.common.records import git_commit
from scripts.fetch_model import DEFAULT_FOLDER, fetch
from testbed.servers import Server, ServerError, dtype_flags, hardware_name, launch_server

mpl.use("Agg")
import matplotlib.pyplot as plt

COMMON_FLAGS = (
    f"--page-size {PAGE_SIZE} --chunked-prefill-size 512 --max-running-requests 4 "
    "--enable-cache-report --random-seed 0 --log-level info"
).split()
WORKING_SET_RATIO = 4.0
"""Tokens of all transcripts over tokens that the 16-bit cache holds."""
CPU_KV_TOKENS = 3328
GPU_KV_TOKENS = 32768


@dataclass(frozen=True)
class Run:
    """Measurements of one server; the field names are the keys in `demo.json`."""

    format: str
    capacity_tokens: int
    bytes_per_token: float
    hit_rate: float
    prompt_tokens_recomputed: int
    ttft_p50_s: float
    ttft_p95_s: float
    total_s: float
    agreement: float | None
    agreement_tokens: int
    agreement_cached_share: float | None
    prompt_tokens: int
    prompt_tokens_computed: int
    server_start_s: float


def choose_sizes(kv_tokens: int, context_tokens: int, on_gpu: bool) -> WorkloadSizes:
    """Return a workload of about `WORKING_SET_RATIO * kv_tokens` distinct tokens.

    On a CPU, long documents and short answers: what the cache saves is prefill, and decoding
    costs every server about the same.

    Args:
        kv_tokens: Tokens that the 16-bit cache holds; one agent's transcript fits in them.
        context_tokens: Longest sequence that the model takes; a transcript fits in it, too.
        on_gpu: Whether there is the speed for longer documents and answers.
    """
    num_rounds = 2
    answer_tokens = 48 if on_gpu else 12
    turns_tokens = num_rounds * (QUESTION_TOKENS + answer_tokens)
    room = min(kv_tokens, context_tokens) - turns_tokens - PAGE_SIZE
    if room < PAGE_SIZE:
        raise ValueError(
            f"KV memory: expected room for a transcript of {turns_tokens + 2 * PAGE_SIZE} tokens, "
            f"got {min(kv_tokens, context_tokens)}; give more by --kv-memory-gb"
        )
    shared_tokens = min(4096 if on_gpu else 768, room * 3 // 10)
    private_tokens = min(8192 if on_gpu else 2048, room - shared_tokens)
    own_tokens = private_tokens + turns_tokens
    num_agents = max(2, int((WORKING_SET_RATIO * kv_tokens - shared_tokens) / own_tokens))
    return WorkloadSizes(num_agents, num_rounds, shared_tokens, private_tokens, answer_tokens)


class Demo:
    """Runs the formats one after the other and keeps what the table and the plot need.

    Args:
        model: Hugging Face folder.
        out: Folder for logs and results.
        kv_memory_gb: GiB of KV memory; None takes enough for a workload of a few minutes.
        console: Where progress goes.
    """

    def __init__(
        self, model: Path, out: Path, kv_memory_gb: float | None, console: Console
    ) -> None:
        from transformers import AutoTokenizer

        self._model, self._out, self._console = model, out, console
        on_gpu = torch.cuda.is_available()
        self._shape = ModelShape.read(model)
        bytes_per_token = self._shape.bytes_per_token
        default_bytes = (GPU_KV_TOKENS if on_gpu else CPU_KV_TOKENS) * bytes_per_token
        self.kv_bytes = int(kv_memory_gb * 2**30) if kv_memory_gb else default_bytes
        kv_tokens = self.kv_bytes // bytes_per_token
        self.sizes = choose_sizes(kv_tokens, self._shape.context_tokens, on_gpu)
        self._workload = Workload(AutoTokenizer.from_pretrained(model), self.sizes)
        self._reference: list[Request] = []
        self.requests: dict[str, list[Request]] = {}
        self.runs: list[Run] = []

    def describe(self) -> None:
        """Print what is going to happen."""
        sizes = self.sizes
        self._console.print(
            f"[bold]{sizes.num_agents} agents x {sizes.num_rounds} rounds[/bold] over "
            f"{sizes.shared_tokens:,} shared and {sizes.private_tokens:,} own tokens each, "
            f"up to {sizes.working_set_tokens:,} distinct tokens; "
            f"{self.kv_bytes / 2**20:.1f} MiB of KV memory, "
            f"{self.kv_bytes // self._shape.bytes_per_token:,} tokens in 16 bits"
        )
        if dtype_flags():
            self._console.print(
                "this CPU has no bfloat16 instructions: models compute in float32; stock SGLang "
                "gets as many tokens as fit in 16 bits"
            )

    def run(self, kv_format: str) -> Run:
        """Serve one format, let the agents work, score the answers."""
        self._console.rule(f"[bold]{kv_format}")
        flags = system_flags(kv_format) + kv_flags(kv_format, self.kv_bytes, self._shape)
        self._console.print(f"sglang.launch_server --model-path {self._model} {' '.join(flags)}")
        with self._console.status("starting the server") as status:
            log_path = self._out / f"server-{kv_format}.log"
            with launch_server(
                self._model,
                [*COMMON_FLAGS, *dtype_flags(), *flags],
                log_path,
                on_wait=lambda waited_s: status.update(f"starting the server, {waited_s:.0f} s"),
            ) as server:
                capacity_tokens = server.capacity_tokens()
                self._console.print(f"ready in {server.start_s:.0f} s: {capacity_tokens:,} tokens")
                status.update("agents at work")
                answered = self._workload.run(server, self._report)
                run = self._measure(kv_format, server, capacity_tokens, answered)
        self.requests[kv_format] = answered
        self.runs.append(run)
        return run

    def _measure(
        self, kv_format: str, server: Server, capacity_tokens: int, answered: list[Request]
    ) -> Run:
        """Put a run's figures together; the baseline's answers become the reference."""
        agreement, agreement_tokens, cached_share = None, 0, None
        if kv_format == STOCK:
            self._reference = answered
            agreement = 1.0
        elif self._reference:
            self._console.print("scoring bf16's answers, teacher-forced")
            scored = self._workload.score_agreement(server, self._reference)
            agreement, agreement_tokens = scored.share, scored.num_tokens
            cached_share = scored.cached_share
        summary = summarize(answered)
        return Run(
            format=kv_format,
            capacity_tokens=capacity_tokens,
            bytes_per_token=self.kv_bytes / capacity_tokens,
            hit_rate=summary.hit_rate,
            prompt_tokens_recomputed=summary.prompt_tokens_recomputed,
            ttft_p50_s=summary.ttft_p50_s,
            ttft_p95_s=summary.ttft_p95_s,
            total_s=summary.total_s,
            agreement=agreement,
            agreement_tokens=agreement_tokens,
            agreement_cached_share=cached_share,
            prompt_tokens=summary.prompt_tokens,
            prompt_tokens_computed=summary.prompt_tokens_computed,
            server_start_s=server.start_s,
        )

    def _report(self, request: Request) -> None:
        """Print one answered request on one line."""
        answer = " ".join(request.text.split())
        self._console.print(
            f"round {request.round_index + 1} agent {request.agent_index}: "
            f"{request.prompt_tokens:5,} prompt tokens, {request.cached_tokens:5,} cached, "
            f"first token {request.ttft_s:5.2f} s, total {request.total_s:5.2f} s  "
            f'"{answer[:40]}"',
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def results_table(runs: Sequence[Run], sizes: WorkloadSizes) -> Table:
    """Return the one table of the demo."""
    table = Table(
        title="Same KV memory, same agents",
        caption=f"agents' transcripts: up to {sizes.working_set_tokens:,} distinct tokens",
    )
    columns = ("format", "tokens that fit", "bytes/ token", "hit rate", "prompt tokens recomputed")
    for name in (*columns, "TTFT p50 s", "TTFT p95 s", "total s", "agreement with bf16"):
        table.add_column(name, justify="left" if name == "format" else "right")
    for run in runs:
        table.add_row(
            run.format,
            f"{run.capacity_tokens:,}",
            f"{run.bytes_per_token:,.0f}",
            f"{run.hit_rate:.1%}",
            f"{run.prompt_tokens_recomputed:,}",
            f"{run.ttft_p50_s:.2f}",
            f"{run.ttft_p95_s:.2f}",
            f"{run.total_s:.1f}",
            "-" if run.agreement is None else f"{run.agreement:.1%}",
        )
    return table


def plot(demo: Demo, path: Path) -> None:
    """Draw capacity, hit rate and agreement, first-token times and total time."""
    names = [run.format for run in demo.runs]
    colors = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))
    bar_colors = [colors[name] for name in names]
    figure, ((capacity, shares), (ttft, total)) = plt.subplots(2, 2, figsize=(11, 8))
    bars = capacity.bar(names, [run.capacity_tokens for run in demo.runs], color=bar_colors)
    capacity.bar_label(bars, fmt="{:,.0f}")
    needed = demo.sizes.working_set_tokens
    capacity.axhline(needed, color="black", linestyle="--", label="all transcripts (upper bound)")
    capacity.set(title=f"Tokens that fit in {demo.kv_bytes / 2**20:.0f} MiB", ylabel="tokens")
    capacity.legend(loc="upper left")
    _plot_shares(shares, demo.runs)
    for name in names:
        seconds = [request.ttft_s for request in demo.requests[name]]
        ttft.plot(range(1, len(seconds) + 1), seconds, "o-", color=colors[name], label=name)
    for start in range(demo.sizes.num_agents, len(seconds), demo.sizes.num_agents):
        ttft.axvline(start + 0.5, color="grey", linestyle=":")
    ttft.set(title="Time to first token (dotted: next round)", xlabel="request", ylabel="s")
    ttft.legend()
    first = [sum(request.ttft_s for request in demo.requests[name]) for name in names]
    rest = [run.total_s - seconds for run, seconds in zip(demo.runs, first, strict=True)]
    total.bar(names, first, color=bar_colors, label="to the first token")
    bars = total.bar(
        names, rest, bottom=first, color=bar_colors, alpha=0.45, label="rest of the answer"
    )
    total.bar_label(bars, labels=[f"{run.total_s:.0f} s" for run in demo.runs])
    total.set(title="Total time (dark: to the first token, light: the rest)", ylabel="s")
    for axes in (capacity, ttft, total):
        axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.15)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_shares(axes: Any, runs: Sequence[Run]) -> None:
    """Draw hit rate and agreement side by side on an axis from 0 to 1."""
    series = {"prefix hit rate": [run.hit_rate for run in runs]}
    agreements = [run.agreement for run in runs if run.agreement is not None]
    if len(agreements) == len(runs):
        series["agreement with bf16"] = agreements
    styles = ((-0.2, "dimgrey"), (0.2, "lightgrey"))
    for (offset, color), (label, values) in zip(styles, series.items(), strict=False):
        places = [x + offset for x in range(len(runs))]
        bars = axes.bar(places, values, width=0.4, color=color, label=label)
        axes.bar_label(bars, fmt="{:.2f}")
    axes.set_xticks(range(len(runs)), [run.format for run in runs])
    axes.set(title="Reuse and fidelity", ylabel="share", ylim=(0, 1.3), yticks=[0, 0.5, 1])
    axes.legend(loc="upper left", ncols=2)


def write_json(demo: Demo, model: Path, path: Path) -> None:
    """Write the measurements with what is needed to repeat them."""
    result = {
        "model": str(model),
        "kv_bytes": demo.kv_bytes,
        "device": hardware_name(),
        "dtype_flags": dtype_flags(),
        "sglang_version": version("sglang"),
        "sizes": asdict(demo.sizes) | {"working_set_tokens": demo.sizes.working_set_tokens},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "runs": [asdict(run) for run in demo.runs],
    }
    path.write_text(json.dumps(result, indent=2) + "\n")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help=f"local Hugging Face folder (default: {DEFAULT_FOLDER}, fetched)"
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    parser.add_argument(
        "--formats",
        nargs="+",
        default=[STOCK, "hack4", "hack2"],
        help=f"{STOCK} is stock SGLang, any other is given to --kv-quant",
    )
    parser.add_argument("--kv-memory-gb", type=float, help="GiB of KV memory for every server")
    return parser.parse_args(argv)


def run_demo(args: argparse.Namespace, console: Console) -> None:
    """Run all formats and write the results."""
    begin = time.monotonic()
    if args.model is None:
        with console.status(f"fetching the model to {DEFAULT_FOLDER}"):
            args.model = fetch(DEFAULT_FOLDER)
    if not (args.model / "config.json").is_file():
        raise FileNotFoundError(f"--model: expected a Hugging Face folder, got {args.model}")
    args.out.mkdir(parents=True, exist_ok=True)
    demo = Demo(args.model, args.out, args.kv_memory_gb, console)
    demo.describe()
    for kv_format in args.formats:
        demo.run(kv_format)
    console.print(results_table(demo.runs, demo.sizes))
    write_json(demo, args.model, args.out / "demo.json")
    plot(demo, args.out / "demo.png")
    console.print(
        f"{args.out / 'demo.json'} and {args.out / 'demo.png'} written, "
        f"{time.monotonic() - begin:.0f} s in all"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit status."""
    args = parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        run_demo(args, console)
    except (ServerError, OSError, ValueError) as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
