"""PD on GPUs: long prompts, bf16 pages against quantized ones, behind a slow link or without.

Usage: python -m benchmarks.pd.bench_gpu [--formats bf16 hack2] [--devices 0 1] [--gbit-s 10]
           [--decode-devices 1 0] [--prefill-tp 1] [--decode-tp 1] [--out CSV]

A prefill and a decode instance of each format share one GPU, or have `--decode-devices`, and the
same KV memory on each GPU; the connection between them passes `benchmarks.pd.relay`, with
`--gbit-s 0` loopback alone. Formats on different devices run at the same time, each pair with a
relay of its own. The client does what SGLang's router does: it sends every request to both
instances. Prompts are random tokens, so nothing is cached. First some requests one at a time, then
these prompts again, which the prefill instance has in its cache: what they take is the transfer.
Last, requests that arrive at random times (the same for every format). Without `--model` the
servers load random weights of Llama-3.1-8B's geometry.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import requests
from tabulate import tabulate

from benchmarks.common.records import command_line, git_commit, write_csv
from benchmarks.pd.relay import measure_gbit_s, relay
from benchmarks.serving.model_folder import geometry_folder
from testbed.pd_cluster import Cluster, launch_pd, transfer_metrics
from testbed.servers import ServerError, free_port, hardware_name

FLAGS = "--skip-server-warmup --enable-metrics --random-seed 0 "
FLAGS += "--mm-feature-transport cpu --sampling-backend pytorch"
FIRST_TOKEN, LAST_TOKEN = 10, 40_000
WIRE_BYTES = "sgl_kvq:transfer_wire_bytes_total"
STATE_SECONDS = "sgl_kvq:transfer_state_seconds_"
SHOWN = ("load", "format", "prefill_tp", "decode_tp", "kv_mb_a_request", "kv_share_of_bf16")
SHOWN += ("transfer_s", "transfer_gb_s", "ttft_p50_s", "ttft_p95_s", "jct_mean_s")
SHOWN += ("jct_less_than_bf16", "early_share", "early_share_possible", "failed")


@dataclass(frozen=True)
class Row:
    """One format under one load; field names are the columns.

    `transfer_s` is the mean time from when both instances know of a request until all of it has
    arrived. It holds the prefill, but for prompts of the load "known to prefill" one of at most a
    page, and nothing is early. `transfer_gb_s` are the bytes of a request over it, in 1e9 a second.
    `early_share` are the bytes that had arrived before the last chunk of prefill was computed;
    `early_share_possible` the bytes of all chunks but the last one.
    """

    load: str
    format: str
    prefill_tp: int
    decode_tp: int
    kv_mb_a_request: float
    kv_share_of_bf16: float | None
    transfer_s: float
    transfer_gb_s: float
    ttft_p50_s: float
    ttft_p95_s: float
    jct_mean_s: float
    jct_p95_s: float
    jct_less_than_bf16: float | None
    early_share: float
    early_share_possible: float
    requests: int
    failed: int
    prompt_tokens: int
    output_tokens: int
    chunk_tokens: int
    memory_gb: float
    link_gbit_s: float
    relay_gbit_s: float | None
    start_s: float
    device: str
    commit: str
    command: str


@dataclass(frozen=True)
class Answer:
    """Times of one request from when it was sent."""

    ttft_s: float
    jct_s: float


class PairBench:
    """One pair of instances and the requests for it.

    Args:
        args: The command line.
        kv_format: Of the pages.
        decode_device: CUDA_VISIBLE_DEVICES of the decode instance; the prefill one has this
            process's.
        out: JSON file that receives each row at once.
    """

    def __init__(
        self, args: argparse.Namespace, kv_format: str, decode_device: str, out: Path
    ) -> None:
        self._args, self._format, self._out = args, kv_format, out
        self._decode_env = {"CUDA_VISIBLE_DEVICES": decode_device}
        self._relay_gbit_s: float | None = None
        self._random = random.Random(0)
        self.rows: list[Row] = []

    def run(self, folder: Path) -> None:
        """Start both instances, warm them up, measure all loads."""
        args = self._args
        model = args.model or geometry_folder("8b", args.layers)
        flags = [*FLAGS.split(), "--kv-quant", self._format, *shlex.split(args.server_args)]
        flags += ["--kv-quant-memory-gb", str(args.memory_gb)]
        flags += ["--max-running-requests", str(args.max_running)]
        flags += ["--chunked-prefill-size", str(args.chunk_tokens)]
        if args.model is None:
            flags += ["--load-format", "dummy"]
        with (
            self._link() as prefill,
            launch_pd(
                model,
                flags,
                folder,
                [*prefill, "--tp-size", str(args.prefill_tp)],
                ["--tp-size", str(args.decode_tp)],
                decode_env=self._decode_env,
                start_timeout_s=args.start_s,
            ) as cluster,
        ):
            self._start_s = max(cluster.prefill.start_s, cluster.decode.start_s)
            self._log(f"ready in {self._start_s:.0f} s")
            self._send(cluster, self._prompts(args.warmup), [0.0] * args.warmup)
            self._send(cluster, self._prompts(1), [0.0])
            self._log("warm")
            prompts = self._prompts(args.alone)
            self._measure(cluster, "one at a time", prompts)
            self._measure(cluster, "known to prefill", prompts)
            if args.requests:
                load = f"one in {args.interval_s:g} s"
                self._measure(cluster, load, self._prompts(args.requests), self._random)

    @contextmanager
    def _link(self) -> Iterator[list[str]]:
        """Run the slow link, if there is one; yields the prefill instance's flags for it."""
        gbit_s = self._args.gbit_s
        if not gbit_s:
            yield []
            return
        self._relay_gbit_s = round(measure_gbit_s(gbit_s, int(gbit_s * 1e9 / 8 * 0.5)), 2)
        port = free_port()
        with relay(port, gbit_s) as relay_port:
            advertise = ["--kv-quant-transfer-advertise", f"127.0.0.1:{relay_port}"]
            yield ["--kv-quant-transfer-port", str(port), *advertise]

    def _prompts(self, count: int) -> list[list[int]]:
        tokens, length = range(FIRST_TOKEN, LAST_TOKEN), self._args.prompt_tokens
        return [self._random.choices(tokens, k=length) for _ in range(count)]

    def _log(self, text: str) -> None:
        print(f"{self._format}: {text}", flush=True)

    def _measure(
        self,
        cluster: Cluster,
        load: str,
        prompts: list[list[int]],
        arrivals: random.Random | None = None,
    ) -> None:
        """Send requests and write their row; without `arrivals` one after the other."""
        args, count = self._args, len(prompts)
        before = transfer_metrics(cluster.prefill)
        if arrivals is None:
            outcomes = [self._send(cluster, [prompt], [0.0])[0] for prompt in prompts]
        else:
            times = [0.0]
            for _ in range(count - 1):
                times.append(times[-1] + arrivals.expovariate(1 / args.interval_s))
            outcomes = self._send(cluster, prompts, times)
        after = transfer_metrics(cluster.prefill)
        answers = [outcome for outcome in outcomes if outcome is not None]
        if not answers:
            raise ServerError(f"{self._format}: every request failed")

        def moved(prefix: str) -> float:
            names = [name for name in after if name.startswith(prefix)]
            return sum(after[name] - before.get(name, 0.0) for name in names)

        wire_bytes = moved(WIRE_BYTES)
        transfers = moved(f"{STATE_SECONDS}count:transferring")  # of all ranks
        seconds = moved(f"{STATE_SECONDS}sum:transferring")
        transfer_s = (seconds - moved(f"{STATE_SECONDS}sum:bootstrapping")) / max(1.0, transfers)
        last_chunk = args.prompt_tokens % args.chunk_tokens or args.chunk_tokens
        ttft = sorted(answer.ttft_s for answer in answers)
        jct = sorted(answer.jct_s for answer in answers)
        late = min(len(answers) - 1, int(0.95 * len(answers)))
        row = Row(
            load=load,
            format=self._format,
            prefill_tp=args.prefill_tp,
            decode_tp=args.decode_tp,
            kv_mb_a_request=round(wire_bytes / count / 1e6, 2),
            kv_share_of_bf16=None,
            transfer_s=round(transfer_s, 4),
            transfer_gb_s=round(wire_bytes / count / 1e9 / max(transfer_s, 1e-9), 2),
            ttft_p50_s=round(statistics.median(ttft), 3),
            ttft_p95_s=round(ttft[late], 3),
            jct_mean_s=round(statistics.mean(jct), 3),
            jct_p95_s=round(jct[late], 3),
            jct_less_than_bf16=None,
            early_share=round(moved("sgl_kvq:transfer_early_bytes_total") / wire_bytes, 3),
            early_share_possible=round(1 - last_chunk / args.prompt_tokens, 3),
            requests=count,
            failed=count - len(answers),
            prompt_tokens=args.prompt_tokens,
            output_tokens=args.output_tokens,
            chunk_tokens=args.chunk_tokens,
            memory_gb=args.memory_gb,
            link_gbit_s=args.gbit_s,
            relay_gbit_s=self._relay_gbit_s,
            start_s=round(self._start_s, 1),
            device=hardware_name(),
            commit=git_commit(),
            command=command_line("pd.bench_gpu", args.argv),
        )
        self.rows.append(row)
        self._out.write_text(json.dumps([asdict(row) for row in self.rows]))
        self._log(
            f"{load}: TTFT p50 {row.ttft_p50_s} s, JCT {row.jct_mean_s} s, {row.kv_mb_a_request} "
            f"MB a request in {row.transfer_s} s, {row.early_share:.1%} of them early, link "
            f"{row.relay_gbit_s or 'loopback at full speed'}"
        )

    def _send(
        self, cluster: Cluster, prompts: list[list[int]], times: Sequence[float]
    ) -> list[Answer | None]:
        """Send each prompt at its time, in seconds from now."""
        began = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = []
            for at, prompt in zip(times, prompts, strict=True):
                time.sleep(max(0.0, began + at - time.perf_counter()))
                answers.append(pool.submit(self._ask, cluster, prompt))
            return [answer.result() for answer in answers]

    def _ask(self, cluster: Cluster, prompt: list[int]) -> Answer | None:
        payload: dict[str, Any] = {
            "input_ids": prompt,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": self._args.output_tokens,
                "ignore_eos": True,
            },
        }
        began = time.perf_counter()
        try:
            times = [time.perf_counter() for _ in cluster.stream(payload, self._args.request_s)]
        except (requests.RequestException, ServerError) as error:
            self._log(f"request failed: {error}")
            return None
        return Answer(times[0] - began, times[-1] - began) if times else None


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Add what depends on the bf16 rows, if there are any."""
    bf16 = {row.load: row for row in rows if row.format == "bf16"}
    return [
        replace(
            row,
            kv_share_of_bf16=round(row.kv_mb_a_request / bf16[row.load].kv_mb_a_request, 4),
            jct_less_than_bf16=round(1 - row.jct_mean_s / bf16[row.load].jct_mean_s, 3),
        )
        if row.load in bf16
        else row
        for row in rows
    ]


def run_all(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Run every format in a process of its own; those on different devices at the same time."""
    deadline = time.monotonic() + args.budget_s
    pairs = list(zip(args.devices, args.decode_devices or args.devices, strict=True))
    lanes: dict[tuple[str, str], list[str]] = {}
    for i, kv_format in enumerate(args.formats):
        lanes.setdefault(pairs[i % len(pairs)], []).append(kv_format)

    def run_lane(lane: tuple[str, str]) -> None:
        device, decode_device = lane
        for kv_format in lanes[lane]:
            command = [sys.executable, "-m", "benchmarks.pd.bench_gpu", *args.argv]
            command += ["--only", kv_format, decode_device, str(folder)]
            # Instances share GPUs and start at once: ranks of one find unequal memory free.
            env = os.environ | {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}
            env["CUDA_VISIBLE_DEVICES"] = device
            left_s = max(1.0, deadline - time.monotonic())
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(command, env=env, check=False, timeout=left_s)

    with ThreadPoolExecutor(len(lanes)) as pool:
        list(pool.map(run_lane, lanes))
    return [
        Row(**row)
        for kv_format in args.formats
        if (folder / f"{kv_format}.json").exists()
        for row in json.loads((folder / f"{kv_format}.json").read_text())
    ]


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `argv` is kept for the CSV."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--formats", nargs="+", default=["bf16", "hack2"])
    add("--devices", nargs="+", default=["0"],
        help="CUDA devices, one for each format in turn; 0,1 with --prefill-tp 2")  # fmt: skip
    add("--decode-devices", nargs="+",
        help="of the decode instances, one for each of --devices (default: the same)")  # fmt: skip
    add("--prefill-tp", type=int, default=1, help="GPUs of the prefill instance (default: 1)")
    add("--decode-tp", type=int, default=1, help="GPUs of the decode instance (default: 1)")
    add("--gbit-s", type=float, default=10.0,
        help="speed of the link (default: 10); 0: loopback at full speed")  # fmt: skip
    add("--model", type=Path, help="folder with weights (default: random ones, 8B geometry)")
    add("--layers", type=int, help="of the random model, for trials (default: 32)")
    add("--prompt-tokens", type=int, default=16384)
    add("--output-tokens", type=int, default=64)
    add("--chunk-tokens", type=int, default=4096, help="chunks of prefill (default: 4096)")
    add("--memory-gb", type=float, default=14.0, help="KV memory of each instance's GPUs, GiB")
    add("--max-running", type=int, default=16, help="requests an instance runs at once")
    add("--warmup", type=int, default=2, help="requests at once, before anything is measured")
    add("--alone", type=int, default=4, help="requests one after the other")
    add("--requests", type=int, default=24, help="that arrive at random times (0: none)")
    add("--interval-s", type=float, default=1.4, help="mean time between two of them")
    add("--start-s", type=float, default=150.0, help="longest start of the servers")
    add("--request-s", type=float, default=120.0, help="longest time of a request")
    add("--server-args", default="", help="further flags of both instances, one string")
    add("--budget-s", type=float, default=3600.0, help="kill what still runs after so long")
    add("--out", type=Path, default=Path("benchmarks/results/h200/pd.csv"))
    add("--logs", type=Path, default=Path("out/bench_pd_gpu"))
    add("--only", nargs=3, metavar=("FORMAT", "DEVICE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.decode_devices and len(args.decode_devices) != len(args.devices):
        parser.error("--decode-devices: expected one for each of --devices")
    if args.gbit_s and args.prefill_tp > 1:
        parser.error("--prefill-tp: expected 1 with a relay, which has one port; use --gbit-s 0")
    args.argv = list(argv)
    return args


def main(argv: Sequence[str]) -> int:
    """Measure all formats and write the table."""
    args = parse_args(argv)
    if args.only:
        kv_format, decode_device, folder = args.only
        args.argv = args.argv[: args.argv.index("--only")]
        bench = PairBench(args, kv_format, decode_device, Path(folder) / f"{kv_format}.json")
        try:
            bench.run(args.logs / kv_format)
        except (ServerError, requests.RequestException) as error:
            print(f"{kv_format}: {error}", file=sys.stderr, flush=True)
        return 0 if bench.rows else 1
    with tempfile.TemporaryDirectory() as temporary:
        rows_of_all = with_ratios(run_all(args, Path(temporary)))
    if not rows_of_all:
        return 1
    write_csv(args.out, [asdict(row) for row in rows_of_all])
    shown = [{name: getattr(row, name) for name in SHOWN} for row in rows_of_all]
    print(tabulate(shown, headers="keys"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
