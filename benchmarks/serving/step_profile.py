"""Where the time of one prefill step goes, by the trace of SGLang's own profiler."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from testbed.servers import Server, ServerError

GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
HOST_CATEGORIES = ("cuda_runtime", "cuda_driver")
SCHEDULE, RUN, STEP = "scheduler.get_next_batch_to_run", "scheduler.run_batch", "step[EXTEND"
"""Names that SGLang gives its spans while its profiler runs."""
TIMEOUT_S = 120.0

Event = dict[str, Any]
"""A complete event of the trace; `ts` and `dur` are microseconds."""


@dataclass(frozen=True)
class StepProfile:
    """One prefill step, from the choice of its batch to its last kernel.

    Attributes:
        step_ms: All of it.
        schedule_ms: The scheduler's choice of the batch, allocation of its pages included.
        run_ms: Host time to prepare and launch the batch.
        launches: Calls that start work on the GPU; a graph is one.
        graph_launches: Those of graphs.
        kernels: Kernels that ran, those of graphs included.
        copies: Copies and fills that ran.
        syncs: Calls in which the host waits for the GPU.
        sync_ms: Time spent there.
        kernel_ms: Time in which the GPU did something for the step.
        idle_ms: Time between the first and the last kernel in which it did nothing.
        first_kernel_ms: From the begin until the GPU starts.
    """

    step_ms: float
    schedule_ms: float
    run_ms: float
    launches: int
    graph_launches: int
    kernels: int
    copies: int
    syncs: int
    sync_ms: float
    kernel_ms: float
    idle_ms: float
    first_kernel_ms: float


def record_trace(server: Server, payload: dict[str, Any], folder: Path) -> Path:
    """Let an otherwise idle server answer one request under its profiler; return the trace.

    Args:
        server: Of one rank.
        payload: For `/generate`.
        folder: Of the traces; created.

    Raises:
        ServerError: No trace was written.
    """
    known = set(folder.glob("*.trace.json.gz"))
    options = {"output_dir": str(folder.resolve()), "activities": ["CPU", "GPU"]}
    _post(server, "start_profile", {**options, "with_stack": False})
    server.generate(payload)
    _post(server, "stop_profile", {})
    written = set(folder.glob("*.trace.json.gz")) - known
    if len(written) != 1:
        raise ServerError(f"expected one trace in {folder}, got {len(written)}")
    return written.pop()


def _post(server: Server, name: str, options: dict[str, Any]) -> None:
    requests.post(f"{server.url}/{name}", json=options, timeout=TIMEOUT_S).raise_for_status()


def read_trace(path: Path) -> list[Event]:
    """Return the complete events of a compressed trace in order of their begin."""
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    return sorted((e for e in events if e.get("ph") == "X"), key=lambda event: event["ts"])


def profile_step(events: Sequence[Event]) -> StepProfile:
    """Return what the first prefill step of a trace consists of.

    Args:
        events: Of `read_trace`.

    Raises:
        ServerError: There is no such step.
    """
    schedule, run = _find_step(events)
    begin, end = schedule["ts"], _end(run)
    host = _host_calls(events, schedule, run)
    gpu = _started_by(events, host)
    launches = [e for e in host if "Launch" in e["name"] and "HostFunc" not in e["name"]]
    syncs = [e for e in host if "Synchronize" in e["name"]]
    last = max([end, *map(_end, gpu)])
    busy = _busy_us(gpu)
    first_us, last_us = (gpu[0]["ts"], max(map(_end, gpu))) if gpu else (end, end)
    return StepProfile(
        step_ms=(last - begin) / 1e3,
        schedule_ms=schedule["dur"] / 1e3,
        run_ms=run["dur"] / 1e3,
        launches=len(launches),
        graph_launches=sum("GraphLaunch" in e["name"] for e in launches),
        kernels=sum(e["cat"] == "kernel" for e in gpu),
        copies=sum(e["cat"] != "kernel" for e in gpu),
        syncs=len(syncs),
        sync_ms=sum(e["dur"] for e in syncs) / 1e3,
        kernel_ms=busy / 1e3,
        idle_ms=(last_us - first_us - busy) / 1e3,
        first_kernel_ms=(first_us - begin) / 1e3,
    )


def longest_kernels(events: Sequence[Event], number: int) -> list[dict[str, Any]]:
    """Return the kernels and copies of the step that take longest in all, by name."""
    host = _host_calls(events, *_find_step(events))
    total: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in _started_by(events, host):
        total[event["name"]] += event["dur"]
        calls[event["name"]] += 1
    return [
        {"kernel": name[:90], "calls": calls[name], "ms": round(us / 1e3, 3)}
        for name, us in total.most_common(number)
    ]


def _find_step(events: Sequence[Event]) -> tuple[Event, Event]:
    """Return the spans in which the first prefill step was chosen and launched."""
    spans = list(_of(events, ("user_annotation",)))
    steps = [e for e in spans if e["name"].startswith(STEP)]
    if not steps:
        raise ServerError(f"expected a span {STEP!r}... in the trace, got none")
    begin = steps[0]["ts"]
    runs = [e for e in spans if e["name"] == RUN and e["ts"] <= begin <= _end(e)]
    choices = [e for e in spans if e["name"] == SCHEDULE and e["ts"] <= begin]
    if not runs or not choices:
        raise ServerError(f"expected spans {SCHEDULE!r} and {RUN!r} around the step, got none")
    return choices[-1], runs[-1]


def _host_calls(events: Sequence[Event], schedule: Event, run: Event) -> list[Event]:
    """Return the calls of the CUDA runtime and driver within a step."""
    begin, end = schedule["ts"], _end(run)
    return [e for e in _of(events, HOST_CATEGORIES) if begin <= e["ts"] < end]


def _started_by(events: Sequence[Event], host: Sequence[Event]) -> list[Event]:
    """Return the GPU's events that these calls of the host started."""
    calls = {e["args"]["correlation"] for e in host if "correlation" in e["args"]}
    return [e for e in _of(events, GPU_CATEGORIES) if e["args"].get("correlation") in calls]


def _busy_us(gpu: Sequence[Event]) -> float:
    """Return the time in which at least one of the events runs; they are in order."""
    busy, until = 0.0, float("-inf")
    for event in gpu:
        busy += max(0.0, _end(event) - max(until, event["ts"]))
        until = max(until, _end(event))
    return busy


def _of(events: Iterable[Event], categories: Sequence[str]) -> Iterable[Event]:
    return (event for event in events if event.get("cat") in categories)


def _end(event: Event) -> float:
    return float(event["ts"] + event["dur"])
