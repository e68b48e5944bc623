"""What the benchmark of an agent's turn sends to a real server, counts, and reads from traces."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from benchmarks.serving import step, step_client
from benchmarks.serving.model_folder import QWEN2_5_1_5B, make_folder
from benchmarks.serving.step_client import (
    ANSWER_TOKENS,
    Case,
    CaseError,
    Prompts,
    Times,
    generate_payload,
    measure,
    put_prefix,
)
from benchmarks.serving.step_profile import (
    longest_kernels,
    profile_step,
    read_trace,
    record_trace,
)
from testbed.servers import Server, ServerError


def test_turns_find_the_prefix_and_the_others_times_are_taken(small_server: Server) -> None:
    prompts = Prompts(background_tokens=64)
    prefix = prompts.take(128)
    put_prefix(small_server, prefix, 60)
    alone = measure(small_server, Case(16, 128, 0), prefix, prompts, 2, 60)
    assert len(alone.ttft_ms) == 2
    assert len(alone.itl_ms) == 2 * (ANSWER_TOKENS - 1)
    beside = measure(small_server, Case(16, 128, 1), prefix, prompts, 2, 60)
    # The other request decodes during two turns: at least what each turn itself writes.
    assert len(beside.itl_ms) >= 2 * (ANSWER_TOKENS - 1)
    assert min(*alone.ttft_ms, *beside.ttft_ms) > 0
    # Nothing of the case runs on: the server is idle, so that its cache can be emptied.
    put_prefix(small_server, [], 60)


def test_a_case_that_is_not_what_was_meant_has_no_times(
    small_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = Prompts(background_tokens=64)
    prefix = prompts.take(128)
    put_prefix(small_server, [], 60)
    with pytest.raises(CaseError, match="found 0 cached tokens"):
        measure(small_server, Case(16, 128, 0), prefix, prompts, 1, 60)
    monkeypatch.setattr(step_client, "BACKGROUND_ANSWER_TOKENS", 3)
    with pytest.raises(CaseError, match="another request ended early"):
        measure(small_server, Case(16, 0, 1), [], prompts, 1, 60)
    with pytest.raises(ServerError, match="not done in 0 s"):
        measure(small_server, Case(16, 0, 0), [], prompts, 1, 0.01)


def test_the_server_s_own_profiler_says_when_a_step_ran(
    small_server: Server, tmp_path: Path
) -> None:
    put_prefix(small_server, [], 60)
    payload = generate_payload(Prompts(64).take(16), 2, stream=False)
    profile = profile_step(read_trace(record_trace(small_server, payload, tmp_path)))
    assert profile.step_ms >= profile.run_ms > 0
    assert (profile.kernels > 0) == torch.cuda.is_available()


def test_a_step_owns_the_kernels_it_launched(tmp_path: Path) -> None:
    events = [
        _event("scheduler.get_next_batch_to_run", "user_annotation", 0, 50),
        # An idle turn of the loop is over; this is the choice of the batch.
        _event("scheduler.get_next_batch_to_run", "user_annotation", 100, 200),
        _event("scheduler.run_batch", "user_annotation", 300, 1000),
        _event("step[EXTEND bs=1 toks=16]", "user_annotation", 400, 800),
        _event("step[EXTEND bs=1 toks=16]", "gpu_user_annotation", 500, 800),
        _event("cudaMemcpyAsync", "cuda_runtime", 350, 10, 1),
        _event("cudaStreamSynchronize", "cuda_runtime", 360, 40, 2),
        _event("cuLaunchKernelEx", "cuda_driver", 500, 10, 3),
        _event("cudaGraphLaunch", "cuda_runtime", 600, 20, 4),
        _event("Memcpy HtoD", "gpu_memcpy", 370, 20, 1),
        _event("attend", "kernel", 520, 100, 3),
        _event("gemm", "kernel", 600, 120, 4),  # overlaps by 20
        _event("gemm", "kernel", 1300, 200, 4),  # the graph's second kernel outlasts the host
        # The next step's decode graph is none of this one.
        _event("cudaGraphLaunch", "cuda_runtime", 1400, 20, 5),
        _event("gemm", "kernel", 1600, 500, 5),
    ]
    path = tmp_path / "a.trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": [{"ph": "M", "name": "process_name"}, *events[::-1]]}, file)
    profile = profile_step(read_trace(path))
    assert profile.step_ms == pytest.approx(1.4)  # 100 to 1500
    assert (profile.schedule_ms, profile.run_ms) == pytest.approx((0.2, 1.0))
    assert (profile.launches, profile.graph_launches) == (2, 1)
    assert (profile.kernels, profile.copies) == (3, 1)
    assert (profile.syncs, profile.sync_ms) == (1, pytest.approx(0.04))
    assert profile.kernel_ms == pytest.approx(0.42)  # 20 + 200 + 200
    assert profile.idle_ms == pytest.approx(1.13 - 0.42)  # 370 to 1500
    assert profile.first_kernel_ms == pytest.approx(0.27)
    longest = longest_kernels(read_trace(path), 1)
    assert longest == [{"kernel": "gemm", "calls": 2, "ms": 0.32}]
    with pytest.raises(ServerError, match="expected a span"):
        profile_step([event for event in read_trace(path) if "step" not in event["name"]])


def test_no_two_prompts_begin_alike() -> None:
    prompts = Prompts(background_tokens=8)
    first = [prompts.take(16)[0] for _ in range(200)]
    first += [prompt[0] for prompt in prompts.background(3)]
    assert len(set(first)) == 203
    assert prompts.background(3) == prompts.background(4)[:3]
    assert prompts.take(0) == []


def test_times_between_tokens_are_those_while_turns_arrive() -> None:
    turns = [[10.0, 10.1, 10.2], [11.0, 11.3, 11.4]]
    alone = step_client.times_of(turns, [])
    assert alone.ttft_ms == pytest.approx([100, 300])
    assert alone.itl_ms == pytest.approx([100, 100])
    # What came before the first turn was sent or after the last answer does not count.
    beside = step_client.times_of(turns, [[9.0, 10.5, 10.75, 11.25, 12.0]])
    assert beside.itl_ms == pytest.approx([250, 500])


def test_a_row_has_median_and_99th_percentile() -> None:
    figures = step.summarize(Times(ttft_ms=[float(i) for i in range(101)], itl_ms=[]))
    assert figures == {
        "ttft_ms_p50": 50.0,
        "ttft_ms_p99": 99.0,
        "itl_ms_p50": None,
        "itl_ms_p99": None,
    }


def test_the_small_geometry_is_qwen_s(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(make_folder(tmp_path / "qwen", 2, QWEN2_5_1_5B))
    assert config.architectures == ["Qwen2ForCausalLM"]
    assert config.num_hidden_layers == 2
    assert (config.num_attention_heads, config.num_key_value_heads) == (12, 2)
    assert config.hidden_size // config.num_attention_heads == 128


def test_cached_tokens_are_whole_pages() -> None:
    with pytest.raises(SystemExit):
        step.parse_args(["--cached", "100"])


def _event(
    name: str, category: str, begin_us: int, duration_us: int, correlation: int | None = None
) -> dict[str, Any]:
    args = {} if correlation is None else {"correlation": correlation}
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "ts": begin_us,
        "dur": duration_us,
        "args": args,
    }
