"""Each script in `examples/` runs as a user runs it and prints what it is there to show."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.support import ROOT


def run_example(name: str, *arguments: str) -> str:
    """Run an example; return what it printed."""
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def figures(pattern: str, text: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(pattern, text, re.MULTILINE)}


def test_kernel_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    errors = figures(r"^(\w+) .* error ([\d.]+)$", run_example("kernel_call.py"))
    assert set(errors) == {"bf16", "hack4", "hack2"}
    assert errors["bf16"] < 0.01 < errors["hack4"] < errors["hack2"]


def test_register_format() -> None:
    printed = run_example("register_format.py")
    k, v = (figures(rf"^(\w+) .* of {tensor} ([\d.]+)", printed) for tensor in "KV")
    assert k["k8v4"] == k["hack8"] < k["hack4"]
    assert v["k8v4"] == v["hack4"] > v["hack8"]


@pytest.mark.long
def test_engine(model_path: str) -> None:
    printed = run_example("engine.py", model_path)
    assert "Madrid" in printed
    assert "Berlin" in printed
    assert "64 of 89 prompt tokens cached" in printed


@pytest.mark.long
@pytest.mark.parametrize("name", ["openai_client.py", "pd_pair.py"])
def test_servers(name: str, model_path: str) -> None:
    assert "Paris" in run_example(name, model_path)
