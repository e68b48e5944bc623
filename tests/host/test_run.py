"""Programs of SGLang that do not load its plugins themselves."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

OPTIONS = ("--kv-quant-memory-gb", "0.02", "--batch-size", "2", "--input-len", "100")


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )


def one_batch(model_path: str, *options: str) -> subprocess.CompletedProcess[str]:
    return run(
        *("-m", "sgl_kvq", "run", "sglang.benchmark.one_batch", "--model-path", model_path),
        *(*OPTIONS, "--output-len", "4", "--result-filename", "", *options),
    )


@pytest.mark.usefixtures("cpu")
def test_bench_one_batch_serves_from_quantized_pages(tiny_model_path: str) -> None:
    done = one_batch(tiny_model_path, "--kv-quant", "hack2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Decode.  median latency" in done.stdout + done.stderr
    assert "--kv-quant hack2: " in done.stdout + done.stderr  # what the pool says of itself


def test_its_mistakes_are_one_line(tiny_model_path: str) -> None:
    done = one_batch(tiny_model_path, "--kv-quant", "hack3")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: --kv-quant: expected one of ")


def test_a_module_that_does_not_exist() -> None:
    done = run("-m", "sgl_kvq", "run", "sglang.no_such_program")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: run: expected a module, got sglang.no_such_program")


def test_one_line_makes_a_program_s_own_server_args_know_the_flag(tiny_model_path: str) -> None:
    """README: before or after the program has imported `ServerArgs`."""
    done = run(
        "-c",
        "from sglang.srt.server_args import ServerArgs\n"
        "from sglang.srt.plugins import load_plugins; load_plugins()\n"
        f"print(ServerArgs(model_path={tiny_model_path!r}, kv_quant='hack2').kv_quant)\n",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "hack2"
