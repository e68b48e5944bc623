"""Decode speed on a CPU: `--kv-quant FORMAT` against stock SGLang's `torch_native` backend.

Usage: python -m benchmarks.kernels.cpu_decode [--model DIR] [--format hack2] [--out CSV]

Both servers run in the same invocation and are measured in turn (A, B, A, B, ...), so that a
change in the machine's load meets both. Only one of them is awake at a time: an idle SGLang
scheduler polls, so the other one's processes are stopped by a signal.

A rate is output tokens per second of the whole batch, counted from the moment when every request
of the batch has its first token to the last token: it holds no prefill. The contexts are real
text, different for each request of a batch, and lie in the server's prefix cache before the
first measurement, that is, in quantized pages. Reported is the median of the repeats. Rows of other
CPUs in the CSV stay.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import requests
from tabulate import tabulate

from benchmarks.common.records import command_line, git_commit, read_csv, write_csv
from scripts.fetch_model import DEFAULT_FOLDER, fetch
from testbed.servers import (
    Server,
    ServerError,
    cpu_name,
    launch_server,
)

STOCK = "bf16"
PAGE_SIZE = 64
REQUEST_TIMEOUT_S = 600
SHAPE_COLUMNS = ("format", "batch", "context")
SPEED_COLUMNS = ("tok_s", "tok_s_stock", "ratio")


def contexts(model: Path, count: int, length: int) -> list[list[int]]:
    """Return `count` different token sequences of `length` tokens of CPython's documentation."""
    from transformers import AutoTokenizer

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = AutoTokenizer.from_pretrained(model).encode(text)
    if len(ids) < count * length:
        raise ValueError(f"--contexts: expected at most {len(ids) // count} tokens, got {length}")
    return [ids[i * length : (i + 1) * length] for i in range(count)]


def decode_rate(server: Server, prompts: Sequence[list[int]], num_tokens: int) -> float:
    """Return the output tokens per second of a batch, prefill excluded.

    Args:
        server: An idle server.
        prompts: Token ids of each request; all requests are sent at once.
        num_tokens: Output tokens of each request; the end token does not stop it.
    """
    payload = {
        "input_ids": list(prompts),
        "sampling_params": {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True},
        "stream": True,
    }
    counts: dict[int, int] = {}
    begin_s = begin_tokens = None
    now_s = 0.0
    for event in _stream(server, payload):
        now_s = time.perf_counter()
        counts[event.get("index", 0)] = event["meta_info"]["completion_tokens"]
        if begin_s is None and len(counts) == len(prompts):
            begin_s, begin_tokens = now_s, sum(counts.values())
    if begin_s is None or min(counts.values()) < num_tokens:
        raise ServerError(f"expected {num_tokens} tokens of each request, got {counts}")
    return (sum(counts.values()) - begin_tokens) / (now_s - begin_s)


def _stream(server: Server, payload: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the events of a streaming `/generate` request."""
    url = f"{server.url}/generate"
    with requests.post(url, json=payload, stream=True, timeout=REQUEST_TIMEOUT_S) as response:
        response.raise_for_status()
        for line in response.iter_lines(chunk_size=1):
            data = line.removeprefix(b"data: ")
            if data and data != b"[DONE]":
                yield json.loads(data)


def prefill(server: Server, prompts: Sequence[list[int]]) -> None:
    """Put the prompts into the server's prefix cache, one by one."""
    for ids in prompts:
        server.generate(
            {"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": 1}}
        )


@contextmanager
def awake(server: Server) -> Iterator[Server]:
    """Let a paused server run for the duration of the block."""
    server.resume()
    try:
        yield server
    finally:
        server.pause()


def measure(
    servers: dict[str, Server], prompts: list[list[int]], args: argparse.Namespace
) -> dict[tuple[str, int, int], float]:
    """Return the median decode rate by (format, batch, context) of paused servers."""
    for name, server in servers.items():
        print(f"{name}: filling the prefix cache", flush=True)
        with awake(server):
            prefill(server, prompts)
    rates: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    shapes = list(itertools.product(args.contexts, args.batches))
    for repeat, (context, batch) in itertools.product(range(args.repeats), shapes):
        for name, server in servers.items():
            with awake(server):
                cut = [ids[:context] for ids in prompts[:batch]]
                rate = decode_rate(server, cut, args.num_tokens)
            rates[name, batch, context].append(rate)
            print(f"repeat {repeat + 1} context {context} batch {batch} {name}: {rate:.1f} tok/s")
            sys.stdout.flush()
    return {key: statistics.median(values) for key, values in rates.items()}


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Start both servers, measure, return the CSV's rows."""
    model = args.model or fetch(DEFAULT_FOLDER)
    prompts = contexts(model, max(args.batches), max(args.contexts))
    slots = (max(args.contexts) + args.num_tokens + 2 * PAGE_SIZE) * max(args.batches)
    common = f"--page-size {PAGE_SIZE} --chunked-prefill-size 512 --random-seed 0".split()
    common += ["--max-running-requests", str(max(args.batches)), "--max-total-tokens", str(slots)]
    flags = {STOCK: [], args.format: ["--kv-quant", args.format]}
    with tempfile.TemporaryDirectory(prefix="bench_cpu_decode-") as logs:
        first_log, second_log = (Path(logs) / f"{name}.log" for name in flags)
        print(f"starting {STOCK}", flush=True)
        with launch_server(model, common, first_log) as stock:
            stock.pause()
            print(f"starting {args.format}", flush=True)
            with launch_server(model, common + flags[args.format], second_log) as quantized:
                quantized.pause()
                rates = measure({STOCK: stock, args.format: quantized}, prompts, args)
    machine = {
        "cpu": cpu_name(),
        "torch": version("torch"),
        "sglang": version("sglang"),
        "commit": git_commit(),
        "command": command_line("kernels.cpu_decode", args.argv),
    }
    rows = []
    for context, batch in itertools.product(args.contexts, args.batches):
        stock_rate, rate = (rates[name, batch, context] for name in flags)
        shape = {"format": args.format, "batch": batch, "context": context}
        speed = {"tok_s": rate, "tok_s_stock": stock_rate, "ratio": rate / stock_rate}
        rows.append(shape | {key: round(value, 3) for key, value in speed.items()} | machine)
    return rows


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `argv` is kept for the CSV."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help=f"default: {DEFAULT_FOLDER}, fetched")
    parser.add_argument("--format", default="hack2", help="value of --kv-quant")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--num-tokens", type=int, default=16, help="output tokens of a request")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu/decode.csv"))
    args = parser.parse_args(argv)
    args.argv = list(argv)
    return args


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; return the exit status."""
    args = parse_args(argv)
    try:
        rows = run(args)
    except (ServerError, OSError, ValueError) as error:
        print(f"benchmark failed: {error}", file=sys.stderr)
        return 1
    elsewhere = [row for row in read_csv(args.out) if row["cpu"] != cpu_name()]
    write_csv(args.out, elsewhere + rows)
    shown = [{key: row[key] for key in SHAPE_COLUMNS + SPEED_COLUMNS} for row in rows]
    print(tabulate(shown, headers="keys", floatfmt=".2f"))
    print(f"{cpu_name()}; written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
