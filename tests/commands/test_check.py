"""`python -m sgl_kvq check`: what it measures, and that it notices when something is wrong."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

from sgl_kvq.__main__ import main
from sgl_kvq.commands.check import command as check
from sgl_kvq.commands.check import kernel_errors
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.registry import format_names, get_format
from sgl_kvq.host.versions.supported import installed_version
from sgl_kvq.kernels.decode import cpu as decode_cpu
from sgl_kvq.kernels.extend import reference as extend_reference
from sgl_kvq.memory_pool.storage import PagedCache


def test_the_screen_of_a_machine_that_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--formats", "hack2", "bf16", "--head-dim", "64"]) == 0
    text = capsys.readouterr().out
    assert "FAIL" not in text
    assert "everything works" in text
    for word in (
        "torch 2.",
        f"sglang {installed_version()}",
        "0 of",
        "decode error",
        "extend error",
        *format_names(),
    ):
        assert word in text


@pytest.mark.parametrize("is_terminal", [False, True])
def test_every_operation_is_shown_before_it_runs(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling a kernel takes up to a minute, in which the screen must not look dead."""
    screen = io.StringIO()

    def console(**options: Any) -> Console:
        return Console(file=screen, force_terminal=is_terminal, width=200, **options)

    shown: dict[str, str] = {}
    for operation, function in (("decode", "_decode"), ("extend", "extend_error")):
        original = getattr(kernel_errors, function)

        def recorded(*args: Any, operation: str = operation, original: Any = original) -> Any:
            shown[operation] = screen.getvalue()
            return original(*args)

        monkeypatch.setattr(kernel_errors, function, recorded)
    monkeypatch.setattr(check, "Console", console)
    assert main(["check", "--formats", "hack4", "--head-dim", "64"]) == 0
    assert "loading SGLang" in shown["decode"]
    for operation in ("decode", "extend"):
        assert f"hack4: running {operation}" in shown[operation]
    assert "running extend" not in shown["decode"]


@pytest.mark.parametrize("name", format_names())
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_every_format_is_within_the_limit(name: str, head_dim: int) -> None:
    found = kernel_errors.measure(
        PageLayout(get_format(name), head_dim, 2), "cpu", use_kernels=False
    )
    assert found.wrong_bytes == 0
    assert 0 < found.decode_error < check.MAX_ERROR / 2
    assert 0 < found.extend_error < check.MAX_ERROR / 2


def test_a_decode_that_reads_the_wrong_pages_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    original = decode_cpu.plan_decode

    def shifted(table: Any, sink_tokens: int) -> Any:
        table.kv_indices.copy_(table.kv_indices.roll(1))
        return original(table, sink_tokens)

    monkeypatch.setattr(decode_cpu, "plan_decode", shifted)
    assert main(["check", "--formats", "hack4", "--head-dim", "64"]) == 1
    text = capsys.readouterr().out
    assert "FAIL hack4" in text
    assert "1 of 4 failed" in text


def test_an_extend_that_reads_the_wrong_pages_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    original = extend_reference.extend

    def shifted(q: torch.Tensor, cache: PagedCache, *args: Any) -> torch.Tensor:
        return original(q, replace(cache, pages=cache.pages.roll(1, 0)), *args)

    monkeypatch.setattr(extend_reference, "extend", shifted)
    assert main(["check", "--formats", "hack4", "--head-dim", "64"]) == 1
    assert "FAIL hack4" in capsys.readouterr().out


def test_an_append_that_writes_other_bytes_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    original = kernel_errors.encode_pages

    def flipped(*args: Any) -> torch.Tensor:
        pages = original(*args)
        pages[0, 0] ^= 1
        return pages

    monkeypatch.setattr(kernel_errors, "encode_pages", flipped)
    assert main(["check", "--formats", "hack2", "--head-dim", "64"]) == 1


def test_a_dead_hook_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    from sgl_kvq.host import names as host

    load_plugins()
    monkeypatch.setattr(HookRegistry, "_patched", HookRegistry._patched - {host.LOG_STATS})
    assert main(["check", "--formats", "bf16", "--head-dim", "64"]) == 1
    assert "FAIL hooks" in capsys.readouterr().out
