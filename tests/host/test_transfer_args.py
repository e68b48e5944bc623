"""What the options of `kvq-zmq` refuse, in SGLang's own options."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sgl_kvq.errors import ConfigError
from sgl_kvq.host.options import OPTIONS
from sgl_kvq.host.transfer_args import transfer_config
from sgl_kvq.transfer.options import TransferConfig


def options(**changes: Any) -> TransferConfig:
    fields = {option.name: option.default for option in OPTIONS}
    return transfer_config(SimpleNamespace(**(fields | changes)))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("deadline_s", 3.9, "4 to 3600"),
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
