"""The same texts through real servers: python -m benchmarks.fidelity.served --formats kvq2 ...

A server computes prompt log-probabilities with `--kv-quant-prefill quantized`; the offline path
must give the same perplexity. The step at which greedy answers leave those of 16 bits is measured
here only.
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from transformers import AutoTokenizer

from benchmarks.common.records import command_line, git_commit, write_csv
from benchmarks.fidelity.__main__ import CHOSEN, DTYPES, calibrated_file, make_history
from benchmarks.fidelity.corpora import segments
from benchmarks.fidelity.metrics import estimate
from sgl_kvq.fidelity.teacher import Teacher
from testbed.servers import Server, launch_server


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity.served")
    parser.add_argument("--model", type=Path, default=Path(".model/smollm2-135m"))
    parser.add_argument(
        "--formats", nargs="+", metavar="FORMAT", default=["hack2", f"kvq2{CHOSEN}"]
    )
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--segments", type=int, default=2, help="texts of prose")
    parser.add_argument("--answers", type=int, default=4, help="prompts answered greedily")
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--sink-tokens", type=int, default=4)
    parser.add_argument("--memory-gb", default="0.5")
    parser.set_defaults(device="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/fidelity"))
    return parser.parse_args(argv)


def server_options(name: str, args: Namespace) -> list[str]:
    """Options of a server of one format."""
    base, _, calibrated = name.partition("+")
    options = ["--kv-quant", base, "--kv-quant-prefill", "quantized"]
    options += ["--kv-quant-sink-tokens", str(args.sink_tokens), "--dtype", args.dtype]
    options += ["--kv-quant-memory-gb", args.memory_gb]
    if calibrated:
        options += ["--kv-quant-config", calibrated_file(args.model, args, name)]
    return options


def prompt_nll(server: Server, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-probabilities of tokens 1 to T - 1 of a prompt, float32 [T - 1]."""
    payload = {"input_ids": ids.tolist(), "return_logprob": True, "logprob_start_len": 0}
    answer = server.generate(payload | {"sampling_params": {"max_new_tokens": 1}})
    logprobs = answer["meta_info"]["input_token_logprobs"]
    return -torch.tensor([entry[0] for entry in logprobs[1:]])


def answers(server: Server, prompts: list[torch.Tensor], num_tokens: int) -> list[list[int]]:
    """Greedy answers, token ids."""
    sampling = {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    return [
        server.generate({"input_ids": ids.tolist(), "sampling_params": sampling})["output_ids"]
        for ids in prompts
    ]


def diverges_at(found: list[int], expected: list[int]) -> int:
    """First step at which two answers differ, their length if none."""
    pairs = enumerate(zip(found, expected, strict=True))
    return next((step for step, (a, b) in pairs if a != b), len(expected))


def measure(name: str, args: Namespace, teacher: Teacher, exact: list[list[int]]) -> dict[str, Any]:
    """Serve one format; `exact` holds 16-bit answers, and is filled by the format bf16."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = segments("prose", tokenizer, args.context, args.segments)
    prompts = segments("code", tokenizer, args.context // 2, args.answers)
    log = args.out / f"served-{name}.log"
    with launch_server(args.model, server_options(name, args), log) as server:
        served = torch.cat([prompt_nll(server, ids) for ids in texts])
        given = answers(server, prompts, args.answer_tokens)
    if name == "bf16":
        exact[:] = given
    history = make_history(name, args, args.model, teacher)
    offline = []
    for ids in texts:
        rows = torch.cat(list(teacher.logprobs(teacher.hidden(ids, history)[:-1])))
        offline.append(-rows.gather(1, ids[1:, None]).squeeze(1))
    shift = estimate(served - torch.cat(offline))
    steps = [diverges_at(*pair) for pair in zip(given, exact, strict=True)]
    return {
        "format": name,
        "context": args.context,
        "served_ppl": round(float(served.mean().exp()), 4),
        "offline_ppl": round(float(torch.cat(offline).mean().exp()), 4),
        "shift_nats": round(shift.value, 5),
        "shift_low": round(shift.low, 5),
        "shift_high": round(shift.high, 5),
        "mean_abs_nats": round(float((served - torch.cat(offline)).abs().mean()), 5),
        "divergence_step_median": median(steps),
        "answer_tokens": args.answer_tokens,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Serve bf16 and the formats; print a table and write `served.csv`."""
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    teacher = Teacher(args.model, DTYPES[args.dtype])
    made_by = {
        "dtype": args.dtype,
        "commit": git_commit(),
        "command": command_line("fidelity.served", sys.argv[1:] if argv is None else argv),
    }
    exact: list[list[int]] = []
    rows: list[dict[str, Any]] = []
    for name in ["bf16", *(name for name in args.formats if name != "bf16")]:
        rows.append(measure(name, args, teacher, exact) | made_by)
        write_csv(args.out / "served.csv", rows)
    shown = [{name: row[name] for name in row if name not in made_by} for row in rows]
    print(tabulate(shown, "keys", tablefmt="github"))


if __name__ == "__main__":
    main()
