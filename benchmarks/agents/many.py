"""Many agents at once: hit rate and throughput against their number.

Usage: python -m benchmarks.agents.many [--systems bf16 hack4 hack2] [--agents 2 4 8 16]
                                        [--kv-tokens N] [--budget-s S] [--out CSV]

Every agent reads the same system prompt and document, then its own task, and works in turns: it
writes an answer of a tool call's size, the tool's result is added to its transcript, and it asks
again at once. All agents run concurrently, so the cache has to hold all transcripts or computes
them again. Systems get the same bytes of KV memory and run one after the other. Prompts are random
tokens of a fixed seed and answers have a fixed length: neither speed nor hits depend on words.

Without `--model` a GPU serves random weights of Llama-3.1-8B's geometry, a CPU SmolLM2-135M. Every
row is written as soon as it is known, rows that are there are not measured again, and a plot is
drawn from the CSV.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from tabulate import tabulate

from benchmarks.agents.sessions import summarize
from benchmarks.common.kv_memory import ModelShape, server_flags
from benchmarks.common.plot import plot_multi_agent
from benchmarks.common.records import append_csv, command_line, git_commit, read_csv
from benchmarks.common.served import backend_columns
from benchmarks.serving.model_folder import geometry_folder
from scripts.fetch_model import DEFAULT_FOLDER, fetch
from testbed.servers import Server, ServerError, hardware_name, launch_server

COMMON_FLAGS = "--skip-server-warmup --random-seed 0"
FIRST_WORD, LAST_WORD = 1000, 40_000
"""Random tokens come from here: plain words in every vocabulary that is used."""
KEY = ("system", "agents", "kv_tokens", "shared_tokens", "task_tokens", "turns", "device", "model")


@dataclass(frozen=True)
class Sizes:
    """What each agent reads and writes, in tokens.

    Attributes:
        shared_tokens: System prompt and document, the same for all.
        task_tokens: Its own task.
        turns: How often it asks.
        answer_tokens: What it writes in a turn.
        tool_tokens: What a tool's result adds to the transcript.
    """

    shared_tokens: int
    task_tokens: int
    turns: int
    answer_tokens: int
    tool_tokens: int

    def working_set(self, num_agents: int) -> int:
        """Distinct tokens of all transcripts."""
        turns = self.turns * self.answer_tokens + (self.turns - 1) * self.tool_tokens
        return self.shared_tokens + num_agents * (self.task_tokens + turns)


CPU_SIZES = Sizes(shared_tokens=512, task_tokens=128, turns=4, answer_tokens=16, tool_tokens=96)
GPU_SIZES = Sizes(
    shared_tokens=16384, task_tokens=1024, turns=8, answer_tokens=128, tool_tokens=512
)


@dataclass(frozen=True)
class Turn:
    """One answered request; the fields `summarize` needs.

    Attributes:
        prompt_tokens: Length of the prompt.
        cached_tokens: Prompt tokens whose KV the server had in its cache.
        known_tokens: Prompt tokens that were computed before for this agent or, of the shared
            part, for any.
        ttft_s: Seconds to the first token.
        total_s: Seconds to the last.
    """

    prompt_tokens: int
    cached_tokens: int
    known_tokens: int
    ttft_s: float
    total_s: float


class Swarm:
    """Agents that work on one server at the same time.

    Args:
        url: Of the server.
        sizes: Of their transcripts.
        num_agents: How many.
    """

    def __init__(self, url: str, sizes: Sizes, num_agents: int) -> None:
        self._url, self._sizes, self._num_agents = url, sizes, num_agents
        self._shared = _words(0, sizes.shared_tokens)
        self._shared_is_known = False
        self.turns: list[Turn] = []

    async def run(self, timeout_s: float) -> float:
        """Let all agents work to their end; return the seconds it took.

        Raises:
            ServerError: a request failed, or the time was over.
        """
        limits = httpx.Limits(max_connections=None)
        begin = time.perf_counter()
        async with httpx.AsyncClient(timeout=timeout_s, limits=limits) as client:
            agents = [self._work(client, index) for index in range(self._num_agents)]
            try:
                await asyncio.wait_for(asyncio.gather(*agents), timeout_s)
            except (httpx.HTTPError, TimeoutError) as error:
                raise ServerError(f"{self._num_agents} agents: {error!r}") from error
        return time.perf_counter() - begin

    async def _work(self, client: httpx.AsyncClient, index: int) -> None:
        """All turns of one agent."""
        transcript = self._shared + _words(1 + index, self._sizes.task_tokens)
        tools = _words(1_000_000 + index, self._sizes.turns * self._sizes.tool_tokens)
        known = 0
        for turn in range(self._sizes.turns):
            if self._shared_is_known:
                known = max(known, self._sizes.shared_tokens)
            answer = await self._ask(client, transcript, known)
            self._shared_is_known = True
            known = len(transcript) + len(answer)
            start = turn * self._sizes.tool_tokens
            transcript = transcript + answer + tools[start : start + self._sizes.tool_tokens]

    async def _ask(
        self, client: httpx.AsyncClient, prompt: list[int], known_tokens: int
    ) -> list[int]:
        """Send one request, keep its figures, return the answer's tokens."""
        sampling = {"temperature": 0, "max_new_tokens": self._sizes.answer_tokens}
        sampling["ignore_eos"] = True
        payload = {"input_ids": prompt, "sampling_params": sampling, "stream": True}
        begin = time.perf_counter()
        ttft_s, last = None, ""
        async with client.stream("POST", f"{self._url}/generate", json=payload) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    ttft_s = ttft_s or time.perf_counter() - begin
                    last = line
        result = json.loads(last.removeprefix("data: ") or "{}")
        if len(result.get("output_ids", ())) != self._sizes.answer_tokens:
            raise ServerError(f"expected {self._sizes.answer_tokens} tokens, got {last[:200]!r}")
        meta = result["meta_info"]
        total_s = time.perf_counter() - begin
        self.turns.append(
            Turn(len(prompt), meta["cached_tokens"], known_tokens, ttft_s or total_s, total_s)
        )
        return list(result["output_ids"])


def _words(seed: int, count: int) -> list[int]:
    """Random tokens, always the same for a seed."""
    return np.random.default_rng(seed).integers(FIRST_WORD, LAST_WORD, count).tolist()


class Bench:
    """The systems and numbers of agents of one invocation.

    Args:
        args: The command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._deadline = time.monotonic() + args.budget_s
        self._shape = ModelShape.read(args.model)
        sizes = GPU_SIZES if torch.cuda.is_available() else CPU_SIZES
        given = {name: getattr(args, name) for name in vars(sizes)}
        self._sizes = Sizes(**{k: v or getattr(sizes, k) for k, v in given.items()})
        self._done = {_key(row) for row in read_csv(args.out)}

    def run(self) -> None:
        """Serve each system that has rows missing."""
        for system in self._args.systems:
            todo = [
                n for n in self._args.agents if _key(self._setting(system, n)) not in self._done
            ]
            if todo and time.monotonic() < self._deadline:
                self._serve(system, todo)

    def _serve(self, system: str, numbers: Sequence[int]) -> None:
        """Start one server and let ever more agents work on it."""
        args = self._args
        flags = [*COMMON_FLAGS.split(), "--max-running-requests", str(max(args.agents))]
        flags += server_flags(system, self._shape, args.kv_tokens)
        flags += ["--load-format", "dummy"] * args.random_weights
        print(f"{system}: {' '.join(flags)}", flush=True)
        log = args.out.parent / f"server-{system}.log"
        try:
            with launch_server(args.model, flags, log) as server:
                for number in numbers:
                    self._measure(system, server, number)
        except ServerError as error:
            print(f"{system}: {error}", file=sys.stderr, flush=True)

    def _measure(self, system: str, server: Server, num_agents: int) -> None:
        """Let the agents work and write their row."""
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise ServerError("time budget ended")
        server.flush_cache()
        swarm = Swarm(server.url, self._sizes, num_agents)
        total_s = asyncio.run(swarm.run(left_s))
        summary = summarize(swarm.turns)
        output_tokens = len(swarm.turns) * self._sizes.answer_tokens
        row = {
            **self._setting(system, num_agents),
            "capacity_tokens": server.capacity_tokens(),
            **backend_columns(server),
            "working_set_tokens": self._sizes.working_set(num_agents),
            "hit_rate": round(summary.hit_rate, 4),
            "prompt_tokens_recomputed": summary.prompt_tokens_recomputed,
            "output_tok_s": round(output_tokens / total_s, 2),
            "total_tok_s": round((output_tokens + summary.prompt_tokens) / total_s, 2),
            "ttft_p50_s": round(summary.ttft_p50_s, 3),
            "ttft_p95_s": round(summary.ttft_p95_s, 3),
            "total_s": round(total_s, 2),
            "sglang": version("sglang"),
            "commit": git_commit(),
            "command": command_line("agents.many", self._args.argv),
        }
        append_csv(self._args.out, row)
        print(_table([row]), flush=True)

    def _setting(self, system: str, num_agents: int) -> dict[str, Any]:
        """The columns that say what was measured."""
        return {
            "system": system,
            "agents": num_agents,
            "kv_tokens": self._args.kv_tokens,
            **vars(self._sizes),
            "device": hardware_name(),
            "model": self._args.model.name,
        }


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    hidden = {"device", "model", "sglang", "commit", "command", *vars(CPU_SIZES)}
    shown = [{name: row[name] for name in row if name not in hidden} for row in rows]
    return tabulate(shown, headers="keys")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `argv` is kept for the CSV."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--systems", nargs="+", default=["bf16", "hack4", "hack2"])
    parser.add_argument(
        "--agents", nargs="+", type=int, default=[8, 16, 32, 64, 96] if on_gpu else [2, 4, 8, 16]
    )
    parser.add_argument("--model", type=Path, help="local folder with weights")
    parser.add_argument(
        "--kv-tokens",
        type=int,
        default=131_072 if on_gpu else 4096,
        help="bytes of KV memory for every server, in bf16 tokens",
    )
    for name, value in vars(GPU_SIZES if on_gpu else CPU_SIZES).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default: {value}")
    parser.add_argument("--budget-s", type=float, default=3600.0)
    folder = Path("benchmarks/results") / ("h100" if on_gpu else "cpu")
    parser.add_argument("--out", type=Path, default=folder / "multi_agent.csv")
    args = parser.parse_args(argv)
    args.argv = list(argv)
    args.random_weights = on_gpu and args.model is None
    if args.model is None:
        args.model = geometry_folder("8b") if on_gpu else fetch(DEFAULT_FOLDER)
    return args


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; return the exit status."""
    args = parse_args(argv)
    Bench(args).run()
    rows = read_csv(args.out)
    if not rows:
        return 1
    print(_table(rows))
    plot_multi_agent(rows, args.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
