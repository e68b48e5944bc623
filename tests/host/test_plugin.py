"""Entry points, hooks and what stays out of a process while the flag is off."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.metadata import entry_points
from typing import Any

import pytest

from scripts.hook_table import hook_table
from sgl_kvq.errors import HostError
from sgl_kvq.host import names as host
from sgl_kvq.host.versions.supported import SUPPORTED
from tests.support import ROOT


@pytest.fixture
def plugin() -> Any:
    """The plugin after SGLang has loaded it."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sgl_kvq.host import plugin

    return plugin


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    return done.stdout


def test_entry_points_are_found() -> None:
    plugins = {e.name: e.value for e in entry_points(group="sglang.srt.plugins")}
    platforms = {e.name: e.value for e in entry_points(group="sglang.srt.platforms")}
    assert plugins["sgl_kvq"] == "sgl_kvq.host.plugin:register"
    assert platforms["sgl_kvq_cpu"] == "sgl_kvq.host.cpu_platform.entry:activate"


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, sgl_kvq, sgl_kvq.host.names, sgl_kvq.config, sgl_kvq.formats.registry;"
        "print([m for m in ('torch', 'triton', 'sglang') if m in sys.modules])"
    )
    assert run_python(code).strip() == "[]"


PLUGIN_MODULES = {
    f"sgl_kvq.{name}"
    for name in (
        "errors",
        "host",
        "host.names",
        "host.options",
        "host.plugin",
        "host.server_args",
        "host.versions",
        "host.versions.calls",
        "host.versions.internals",
        "host.versions.records",
        "host.versions.supported",
    )
}
"""All that a server without `--kv-quant` loads: the entry point and what declares its options."""

PLATFORM_MODULES = {
    f"sgl_kvq.host.cpu_platform{name}" for name in ("", ".entry", ".platform", ".allocator")
}
"""The CPU platform, a plugin of its own, on a machine without an accelerator."""


def test_with_the_flag_off_only_the_plugin_is_loaded(tiny_model_path: str) -> None:
    code = f"""
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
args = prepare_server_args(["--model-path", {tiny_model_path!r}])
from sglang.srt.mem_cache import kv_cache_configurator, allocation
from sglang.srt.disaggregation import prefill, decode
from sgl_kvq.host.versions.records import resolve, resolved_value
resolve(args)
print(resolved_value(args, "attention_backend"), resolved_value(args, "page_size"), args.kv_quant)
print(*(m for m in sys.modules if m.startswith("sgl_kvq.")))
"""
    values, modules = run_python(code).strip().splitlines()[-2:]
    assert values.split()[1:] == ["1", "None"]
    assert not values.startswith("kvq")
    assert set(modules.split()) - PLATFORM_MODULES == PLUGIN_MODULES


def test_flags_are_in_help(plugin: Any) -> None:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    text = parser.format_help()
    for flag in ("", "-prefill", "-sink-tokens", "-hadamard-block", "-memory-gb"):
        assert f"--kv-quant{flag} " in text
    assert "--kv-quant FORMAT" in text
    assert "python -m sgl_kvq formats" in " ".join(text.split())


def test_register_is_idempotent_and_hooks_are_live(plugin: Any) -> None:
    plugin.register()
    assert len(host.HookRegistry._hooks[host.BUILD_POOL]) == 1
    plugin.check_hooks()


def test_a_dead_hook_is_refused(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    live = host.HookRegistry._patched - {host.ALLOC_EXTEND}
    monkeypatch.setattr(host.HookRegistry, "_patched", live)
    with pytest.raises(HostError, match=r"hooks not live: .*alloc_paged_token_slots_extend"):
        plugin.check_hooks()


def test_every_host_name_exists() -> None:
    for name in host.NAMES:
        assert getattr(host, name) is not None


def test_a_moved_host_name_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(host.NAMES, "Gone", "sglang.srt.nowhere:Gone")
    with pytest.raises(HostError, match=r"has no sglang.srt.nowhere:Gone; install sglang==0\.5"):
        _ = host.Gone


def test_the_documented_hooks_are_those_of_the_plugin(plugin: Any) -> None:
    assert hook_table() in (ROOT / "patches" / "README.md").read_text()
    assert f"{SUPPORTED[0]} to {SUPPORTED[-1]}" in (ROOT / "patches" / "README.md").read_text()
