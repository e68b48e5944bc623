"""Entry points, hooks and what stays out of a process while the flag is off."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from sgl_kvq.formats.registry import format_names


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


def test_with_the_flag_off_only_the_plugin_is_loaded(tiny_model_path: str) -> None:
    code = f"""
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
args = prepare_server_args(["--model-path", {tiny_model_path!r}])
from sglang.srt.mem_cache import kv_cache_configurator, allocation
ours = sorted(m for m in sys.modules if m.startswith("sgl_kvq."))
print(args.attention_backend, args.page_size, args.kv_quant, ours)
"""
    last = run_python(code).strip().splitlines()[-1]
    assert last.startswith("torch_native 1 None [")
    for heavy in ("attention", "kernels", "memory_pool"):
        assert f"sgl_kvq.{heavy}" not in last


def test_flags_are_in_help() -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    text = parser.format_help()
    for flag in ("", "-prefill", "-sink-tokens", "-hadamard-block", "-memory-gb"):
        assert f"--kv-quant{flag} " in text
    assert f"{{{','.join(format_names())}}}" in text


def test_register_is_idempotent_and_hooks_are_live() -> None:
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    from sgl_kvq.host import names as host
    from sgl_kvq.host import plugin

    load_plugins()
    plugin.register()
    assert len(HookRegistry._hooks[host.BUILD_POOL]) == 1
    plugin.check_hooks()


def test_a_dead_hook_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    from sgl_kvq.errors import HostError
    from sgl_kvq.host import names as host
    from sgl_kvq.host import plugin

    load_plugins()
    monkeypatch.setattr(HookRegistry, "_patched", HookRegistry._patched - {host.ALLOC_EXTEND})
    with pytest.raises(HostError, match=r"hooks not live .*alloc_paged_token_slots_extend"):
        plugin.check_hooks()


def test_every_host_name_exists() -> None:
    from sgl_kvq.host import names as host

    for name in host._NAMES:
        assert getattr(host, name) is not None


def test_a_moved_host_name_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from sgl_kvq.errors import HostError
    from sgl_kvq.host import names as host

    monkeypatch.setitem(host._NAMES, "Gone", "sglang.srt.nowhere:Gone")
    with pytest.raises(HostError, match=r"has no sglang.srt.nowhere:Gone \(tested with 0\.5\.17\)"):
        _ = host.Gone


def test_another_version_is_refused_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    from sgl_kvq.errors import ConfigError
    from sgl_kvq.host import names as host

    monkeypatch.setattr(host, "installed_version", lambda: "0.6.0")
    with pytest.raises(ConfigError, match=r"expected SGLang 0\.5\.17, got 0\.6\.0; install"):
        host.check_version()
    monkeypatch.setenv(host.ALLOW_UNTESTED_ENV, "1")
    host.check_version()
