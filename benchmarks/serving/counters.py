"""What a server's `/metrics` says: tokens, latencies, and whether the quantized pool adds up."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import requests
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.common.records import append_csv
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.host.metrics import GAUGES, NONFINITE, PREFIX
from testbed.servers import Server

TOKENS = "sglang:realtime_tokens_total"
TTFT = "sglang:time_to_first_token_seconds"
ITL = "sglang:inter_token_latency_seconds"
SAMPLE_INTERVAL_S = 2.0


@dataclass
class Counters:
    """Sums since a server's start.

    Attributes:
        tokens: By `mode`: decode, prefill_compute, prefill_cache.
        ttft: Requests whose time to first token is at most so many seconds, by that bound.
        itl: Likewise steps, by time between tokens.
    """

    tokens: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    ttft: dict[float, float] = field(default_factory=lambda: defaultdict(float))
    itl: dict[float, float] = field(default_factory=lambda: defaultdict(float))

    @classmethod
    def read(cls, server: Server) -> Counters:
        """Read a server's counters now."""
        counters = cls()
        histograms = {f"{TTFT}_bucket": counters.ttft, f"{ITL}_bucket": counters.itl}
        for name, labels, value in _samples(server):
            if name == TOKENS:
                counters.tokens[labels["mode"]] += value
            elif name in histograms:
                histograms[name][float(labels["le"])] += value
        return counters


def quantile(before: dict[float, float], after: dict[float, float], share: float) -> float | None:
    """Return a quantile of what a cumulative histogram gained, linear inside a bucket.

    Args:
        before: Count up to each bound, at the begin.
        after: Likewise at the end.
        share: 0 to 1.

    Returns:
        None if nothing was counted, or the value lies beyond the last bound.
    """
    gained = {bound: after[bound] - before.get(bound, 0.0) for bound in sorted(after)}
    wanted = share * gained.get(math.inf, 0.0)
    lower, below = 0.0, 0.0
    for bound, count in gained.items():
        if count >= wanted > 0:
            if math.isinf(bound):
                return None
            return lower + (bound - lower) * (wanted - below) / (count - below)
        lower, below = bound, count
    return None


class PoolWatch:
    """Reads the gauges of a quantized pool now and then and looks for contradictions.

    Args:
        server: With or without `--kv-quant`; without it there is nothing to read.
        out: CSV of all readings.

    Attributes:
        problems: What did not add up, in words.
    """

    def __init__(self, server: Server, out: Path) -> None:
        self._server, self._out = server, out
        self._next_s = self._begin_s = time.monotonic()
        self.problems: list[str] = []
        out.unlink(missing_ok=True)

    def sample(self) -> None:
        """Read the gauges, if it is time to."""
        if time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + SAMPLE_INTERVAL_S
        found = pool_gauges(self._server)
        if not found:
            return
        append_csv(self._out, {"seconds": round(time.monotonic() - self._begin_s, 1), **found})
        self.problems += [p for p in pool_problems(found) if p not in self.problems]


def pool_gauges(server: Server) -> dict[str, float]:
    """Return our metrics by name, without prefix; empty without `--kv-quant`."""
    names = {*GAUGES, f"{NONFINITE}_total"}
    found = {name.removeprefix(PREFIX): value for name, _, value in _samples(server)}
    return {name: found[name] for name in sorted(names & set(found))}


def pool_problems(found: dict[str, float]) -> list[str]:
    """Return what contradicts itself among the metrics of one reading.

    Args:
        found: Of `pool_gauges`.
    """
    names = {*GAUGES, f"{NONFINITE}_total"}
    if missing := names - set(found):
        return [f"{', '.join(sorted(missing))} missing"]
    held = found["closed_pages"] + found["open_pages"]
    checks = {
        "more open pages than slots": found["open_pages"] > found["open_slots"],
        "more sink rows than pages": found["sink_pages"] > held,
        "a negative count": min(found.values()) < 0,
        "tokens held are not those of the held pages": found["tokens_held"] != held * PAGE_SIZE,
        "pages take more bytes than the pool": held * PAGE_SIZE * found["bytes_per_token"]
        > found["pool_bytes"],
        "elements of K or V were not finite": found[f"{NONFINITE}_total"] > 0,
    }
    return [f"{what}: {found}" for what, is_so in checks.items() if is_so]


def _samples(server: Server) -> list[tuple[str, dict[str, str], float]]:
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    return [
        (sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
