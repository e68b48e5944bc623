"""The pieces of `python -m benchmarks.serving` that need no server."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from benchmarks.common.kv_memory import ModelShape, kv_flags, server_flags
from benchmarks.serving import __main__ as driver
from benchmarks.serving.counters import pool_problems, quantile
from benchmarks.serving.model_folder import LLAMA_3_1_70B, make_folder
from benchmarks.serving.random_bases import main as write_random_bases
from benchmarks.serving.workloads import make_workloads
from sgl_kvq.formats.calibration import load_calibration


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "one-layer", num_layers=1)


def test_every_token_is_a_word_and_back(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == AutoConfig.from_pretrained(folder).vocab_size == 128256
    ids = [*range(2, 128256, 997), 128255, 61, 62, 3843, 3844]
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_kv_memory_is_the_same_bytes(folder: Path) -> None:
    shape = ModelShape.read(folder)
    assert shape.bytes_per_token == 8 * 128 * 2 * 2  # KV heads, channels, K and V, bytes
    kv_bytes = 6400 * shape.bytes_per_token
    assert kv_flags("bf16", kv_bytes, shape)[1] == "6400"
    assert kv_flags("fp8", kv_bytes, shape)[1] == "12800"
    assert float(kv_flags("hack2", kv_bytes, shape)[1]) == pytest.approx(kv_bytes / 2**30, abs=1e-8)


@pytest.mark.parametrize("system", ["bf16", "fp8", "hack2"])
def test_kv_memory_is_that_of_each_gpu(folder: Path, system: str) -> None:
    """Two GPUs of a server hold 6,400 tokens' bytes each, so twice as many bf16 tokens in all."""
    shape = ModelShape.read(folder)
    one, two = (server_flags(system, shape, 6400, tp=tp) for tp in (1, 2))
    assert two[-4:-2] == ["--tp-size", "2"]
    assert "--tp-size" not in one
    if system == "hack2":  # the option is of each GPU already
        assert one[-2:] == two[-2:]
    else:
        assert int(two[-1]) == 2 * int(one[-1])
    # From 8 GPUs on each holds one of 8 KV heads.
    assert shape.bytes_of_rank(8) == shape.bytes_of_rank(16) == shape.bytes_per_token // 8


def test_a_calibration_goes_to_the_formats_that_take_one(folder: Path, tmp_path: Path) -> None:
    argv = ["--model", str(folder), "--out", str(tmp_path / "serving.csv"), "--tp", "2"]
    argv += ["--calibration", "bases.safetensors"]
    bench = driver.Bench(driver.parse_args(argv))
    for system in ("bf16", "fp8", "hack2", "kvq2"):
        flags = bench._server_flags(system)
        assert ("--kv-quant-config" in flags) == (system == "kvq2")
        assert flags[flags.index("--tp-size") + 1] == "2"
        assert not {"--attention-backend", "--disable-prefill-cuda-graph"} & set(flags)


def test_random_bases_are_different_and_orthonormal(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "two-layers", 2, LLAMA_3_1_70B)
    path = tmp_path / "bases.safetensors"
    assert write_random_bases([str(folder), str(path)]) == 0
    bases = load_calibration("kvq2", str(path), 2, 8, 128).bases
    matrices = torch.cat([part for basis in bases for part in (basis.k, basis.v)])
    torch.testing.assert_close(matrices @ matrices.mT, torch.eye(128).expand_as(matrices))
    assert len({matrix[0, 0].item() for matrix in matrices}) == len(matrices) == 2 * 2 * 8
    assert write_random_bases([str(folder)]) == 2


def test_shared_prefixes_are_four_times_the_pool_at_every_length() -> None:
    workload = make_workloads(400_000)["shared-prefix"]
    for lengths in (1.0, 0.25):
        scaled = workload.scaled(1.0, lengths)
        assert scaled.num_prefixes * scaled.prefix_tokens == pytest.approx(1_600_000, rel=0.01)
        assert scaled.num_prompts == 8 * scaled.num_prefixes


def test_the_flags_are_bench_servings_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.benchmark import serving

    parsed: list[argparse.Namespace] = []
    monkeypatch.setattr(serving, "run_benchmark", parsed.append)
    for workload in make_workloads(400_000).values():
        monkeypatch.setattr("sys.argv", ["bench_serving", *workload.flags()])
        serving.cli_main()
        assert parsed[-1].num_prompts == workload.num_prompts
        assert parsed[-1].max_concurrency == workload.concurrency
    assert parsed[0].random_range_ratio == 1.0
    assert parsed[-1].gsp_num_groups == make_workloads(400_000)["shared-prefix"].num_prefixes


def test_a_second_run_goes_on_with_what_is_missing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[str, list[str]]] = []

    def serve(bench: driver.Bench, system: str, workloads: Any) -> None:
        started.append((system, [workload.name for workload in workloads]))
        statuses = {"bf16": "ok", "hack2": "timeout"}
        for workload in workloads:
            outcome = driver.Outcome(statuses[system], 1, 1.0)
            driver.append_csv(out, bench._row(system, workload, {"capacity_tokens": 1}, outcome))

    monkeypatch.setattr(driver.Bench, "_serve", serve)
    out = tmp_path / "serving.csv"
    names = ["256/1024 x64", "shared-prefix"]
    argv = ["--model", str(folder), "--systems", "bf16", "hack2", "--out", str(out)]
    argv += ["--workloads", *names]
    assert driver.main(argv) == 0
    assert started == [("bf16", names), ("hack2", names)]
    started.clear()
    driver.main(argv)
    assert started == [("hack2", names)]  # what timed out is tried again
    started.clear()
    driver.main([*argv, "--scale", "0.5"])
    assert started == [("bf16", names), ("hack2", names)]  # another size, another measurement
    started.clear()
    driver.main([*argv, "--tp", "2"])
    assert started == [("bf16", names), ("hack2", names)]


def test_a_results_file_without_tp_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "serving.csv"
    out.write_text("workload,system,status\n256/1024 x64,bf16,ok\n")
    with pytest.raises(SystemExit, match="expected a file with a column tp"):
        driver.main(["--model", str(folder), "--out", str(out)])


def test_ratios_are_to_the_latest_row_of_one_gpu() -> None:
    def row(tp: int, rate: str, **more: str) -> dict[str, str]:
        what = dict.fromkeys(driver.KEY, "x") | {"system": "kvq2", "tp": str(tp), "status": "ok"}
        return what | {"output_tok_s": rate, "total_tok_s": "100"} | more

    rows = [row(1, "7", status="timeout"), row(1, "10"), row(2, "19"), row(2, "", system="bf16")]
    rows += [row(2, "40", kv_tokens="5"), row(1, "1", workload="y")]
    assert driver.tp_ratios(rows) == [
        {
            "workload": "x",
            "system": "kvq2",
            "tp": "2",
            "output_tok_s over TP 1": 1.9,
            "total_tok_s over TP 1": 1.0,
            "status": "ok, ok",
        }
    ]


def test_quantiles_of_what_a_histogram_gained() -> None:
    before = {0.1: 5.0, 0.2: 5.0, 0.4: 5.0, math.inf: 5.0}
    after = {0.1: 5.0, 0.2: 15.0, 0.4: 25.0, math.inf: 25.0}
    assert quantile(before, after, 0.25) == pytest.approx(0.15)
    assert quantile(before, after, 0.5) == pytest.approx(0.2)
    assert quantile(before, after, 0.75) == pytest.approx(0.3)
    assert quantile(before, before, 0.5) is None
    assert quantile(before, {**after, math.inf: 45.0}, 0.99) is None


def test_contradictions_among_the_pool_s_metrics_are_found() -> None:
    right = {
        "closed_pages": 30,
        "open_pages": 4,
        "free_pages": 6,
        "tokens_held": 34 * 64,
        "bytes_per_token": 84,
        "pool_bytes": 400_000,
        "open_slots": 4,
        "sink_pages": 9,
        "nonfinite_elements_total": 0,
    }
    assert pool_problems(right) == []
    for name, value in (
        ("open_pages", 5),
        ("sink_pages", 35),
        ("free_pages", -1),
        ("tokens_held", 33 * 64),
        ("pool_bytes", 100_000),
        ("nonfinite_elements_total", 1),
    ):
        assert pool_problems({**right, name: value})
    assert (
        "open_slots missing" in pool_problems({k: right[k] for k in right if k != "open_slots"})[0]
    )


def test_one_limit_for_each_workload(folder: Path, tmp_path: Path) -> None:
    argv = ["--model", str(folder), "--out", str(tmp_path / "serving.csv")]
    argv += ["--workloads", "256/1024 x64", "shared-prefix", "--prompts-per-prefix", "3"]
    bench = driver.Bench(driver.parse_args([*argv, "--limit-s", "20", "30"]))
    assert [workload.timeout_s for workload in bench._workloads] == [20, 30]
    assert bench._workloads[1].num_prompts == 3 * bench._workloads[1].num_prefixes
    with pytest.raises(SystemExit):
        driver.parse_args([*argv, "--limit-s", "20", "30", "40"])
