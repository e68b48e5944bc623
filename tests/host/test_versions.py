"""What `sgl_kvq.host.versions` says about the SGLang that is installed."""

from __future__ import annotations

import pickle
import re
import tomllib
from typing import Any

import pytest

from sgl_kvq.errors import ConfigError
from sgl_kvq.host.options import OPTIONS
from sgl_kvq.host.versions import calls, internals, records, supported
from tests.support import ROOT


@pytest.fixture(scope="module")
def server_args() -> Any:
    """The class that SGLang builds its options with."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import ServerArgs

    return ServerArgs


def test_the_installed_version_is_supported() -> None:
    supported.check_version()


def test_another_version_is_refused_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supported, "installed_version", lambda: "0.6.0")
    newest = re.escape(supported.SUPPORTED[-1])
    with pytest.raises(ConfigError, match=rf"got 0\.6\.0; install sglang=={newest}, or set "):
        supported.check_version()
    monkeypatch.setenv(supported.ALLOW_UNTESTED_ENV, "1")
    supported.check_version()


def test_pip_accepts_the_supported_versions() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (sglang,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "sglang")
    accepted = sglang.specifier
    assert all(version in accepted for version in supported.SUPPORTED)
    first, last = (tuple(map(int, supported.SUPPORTED[i].split("."))) for i in (0, -1))
    assert f"{first[0]}.{first[1]}.{first[2] - 1}" not in accepted
    assert f"{last[0]}.{last[1]}.{last[2] + 1}" not in accepted


def test_the_options_are_fields_with_their_namespaces(server_args: Any) -> None:
    from sglang.srt.arg_groups.arg_utils import namespace_of

    fields = dict(records.fields_of(server_args))
    namespaces = namespace_of(server_args)
    for option in OPTIONS:
        assert fields[option.name] == option.default
        assert namespaces[option.name] in ("memory", "disagg")


def test_a_record_survives_pickling_with_what_it_resolved(
    server_args: Any, tiny_model_path: str
) -> None:
    """SGLang sends it to each of its processes."""
    args = server_args(model_path=tiny_model_path, kv_quant="hack2", tp_size=1)
    records.resolve(args)
    there = pickle.loads(pickle.dumps(args))
    assert type(there) is server_args
    assert there.kv_quant == "hack2"
    for name, value in (("page_size", 64), ("attention_backend", "kvq")):
        assert records.resolved_value(there, name) == value
    records.resolve(there)
    assert records.model_config_of(there).num_hidden_layers == 2


def test_an_error_in_a_program_is_raised(server_args: Any, tiny_model_path: str) -> None:
    with pytest.raises(ConfigError, match="expected one of"):
        records.resolve(server_args(model_path=tiny_model_path, kv_quant="hack3"))


def test_an_enum_takes_a_further_member_once() -> None:
    from sglang.srt.disaggregation.utils import KVClassType

    internals.add_enum_member(KVClassType, "FURTHER", "further")
    member = KVClassType("further")
    internals.add_enum_member(KVClassType, "FURTHER", "further")
    assert KVClassType("further") is member
    assert member.value == "further"


def test_calls_fit_the_installed_version(server_args: Any) -> None:
    assert calls.differences() == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("seq_lens", "page_size"), "takes page_size, seq_lens in this order"),
        (("page_size", "seq_lens", "rows"), "has no argument rows"),
        (("page_size",), "needs seq_lens"),
    ],
)
def test_a_call_that_does_not_fit_is_found(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], expected: str
) -> None:
    monkeypatch.setattr(calls, "CALLED", {f"{__name__}:example": names})
    monkeypatch.setattr(calls, "OVERRIDING", {})
    assert calls.differences() == [f"{__name__}:example {expected}"]


def example(page_size: int, seq_lens: int, decode: bool = False) -> None: ...


def test_an_override_that_does_not_fit_is_found(
    monkeypatch: pytest.MonkeyPatch, server_args: Any
) -> None:
    from sglang.srt.mem_cache.memory_pool import KVCache

    class Pool(KVCache):
        def get_cpu_copy(self, indices: Any, rows: Any) -> None: ...

    monkeypatch.setattr(calls, "CALLED", {})
    monkeypatch.setattr(calls, "OVERRIDING", {f"{__name__}:example.Pool": False})
    monkeypatch.setattr(example, "Pool", Pool, raising=False)
    first, second = calls.differences()
    assert first.startswith("Pool.get_cpu_copy does not take mamba_indices")
    assert second == "Pool.get_cpu_copy needs rows, which SGLang lacks"


def test_an_argument_is_found_wherever_it_stands() -> None:
    assert calls.argument(example, "seq_lens", 64, 5) == 5
    assert calls.argument(example, "seq_lens", seq_lens=5, page_size=64) == 5
    assert calls.argument(example, "decode", 64, 5) is False
