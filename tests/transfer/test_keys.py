"""`python -m sgl_kvq keys`, and what the options of `kvq-zmq` refuse."""

from __future__ import annotations

import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sgl_kvq.__main__ import main
from sgl_kvq.errors import ConfigError
from sgl_kvq.host.options import OPTIONS
from sgl_kvq.host.transfer_args import transfer_config
from sgl_kvq.transfer.options import TransferConfig, is_loopback
from sgl_kvq.transfer.protocol.handshake import weights_digest


def test_keys_are_made_once_and_for_their_owner_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "keys"
    assert main(["keys", str(folder), "--decode", "east", "west"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{name}.{kind}" for name in ("east", "prefill", "west") for kind in ("key", "key_secret")
    ]
    for path in folder.glob("*.key_secret"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "decode instance east: east.key_secret prefill.key" in capsys.readouterr().out
    assert main(["keys", str(folder)]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["keys", str(tmp_path / "b"), "--decode", "../up"]) == 1


def options(**changes: Any) -> TransferConfig:
    fields = {option.name: option.default for option in OPTIONS}
    return transfer_config(SimpleNamespace(**(fields | changes)))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("deadline_s", 0.1, "1 to 3600"),
        ("port", 70000, "0 to 65535"),
        ("block_kb", 1, "block-kb"),
        ("block_kb", 100_000, "block-kb"),
        ("window_mb", 0.5, "at least one block"),
        ("host", "0.0.0.0", "keys"),
        ("host", "example.org", "keys"),
        ("advertise", ":1", "HOST or HOST:PORT"),
        ("advertise", "host:x", "HOST or HOST:PORT"),
        ("codec", "rar", "identity, lz4, zstd"),
    ],
)
def test_wrong_options_are_one_line(name: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        options(**{f"kv_quant_transfer_{name}": value})
    assert "\n" not in str(error.value)


def test_addresses() -> None:
    assert options(kv_quant_transfer_advertise="10.0.0.1:7").advertise == ("10.0.0.1", 7)
    assert options(kv_quant_transfer_advertise="host").advertise == ("host", 0)
    assert options(kv_quant_transfer_advertise="[::1]:7").advertise == ("::1", 7)
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "10.0.0.1")] == [
        True,
        True,
        True,
        False,
    ]


def test_other_weights_have_another_digest(tiny_model_path: str, tmp_path: Path) -> None:
    """One value changed in the middle of one tensor's first bytes; the file's size stays."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_model_path, copy)
    assert weights_digest(str(copy)) == weights_digest(tiny_model_path)
    (weights,) = copy.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert weights_digest(str(copy)) != weights_digest(tiny_model_path)
