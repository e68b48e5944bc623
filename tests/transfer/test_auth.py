"""Beyond loopback nothing goes without keys, and nothing to unknown ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgl_kvq.errors import ConfigError
from sgl_kvq.transfer.options import TransferConfig
from sgl_kvq.transfer.runtime.curve import make_keys
from tests.support.transfer_pair import (
    DecodeSide,
    PrefillSide,
    assert_equal,
    ship,
    stopped,
    wait_for,
)

CONFIG = TransferConfig(deadline_s=4.0, block_bytes=16384, window_bytes=65536)


def test_beyond_loopback_only_with_keys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keys"):
        TransferConfig(host="0.0.0.0")
    make_keys(tmp_path, ["decode"])
    with pytest.raises(ConfigError, match="exists"):
        make_keys(tmp_path, ["decode"])
    TransferConfig(host="0.0.0.0", keys=tmp_path)


def test_only_known_keys_get_anything(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    make_keys(ours, ["decode"])
    make_keys(theirs, ["decode"])
    # The stranger knows the prefill instance's public key, but its own is not in the folder.
    (theirs / "prefill.key").write_bytes((ours / "prefill.key").read_bytes())
    keyed = {"deadline_s": 4.0, "block_bytes": 16384}
    prefill = PrefillSide(TransferConfig(keys=ours, **keyed))
    decode = DecodeSide(TransferConfig(keys=ours, **keyed))
    stranger = DecodeSide(TransferConfig(keys=theirs, **keyed))
    plain = DecodeSide(TransferConfig(**keyed))
    with stopped(prefill, decode, stranger, plain):
        sent, got = ship(prefill, decode, 1, 300)
        assert_equal(prefill, sent, decode, got, 300)
        outcomes = [side.announce(2, [prefill.endpoint]) for side in (stranger, plain)]
        wait_for(lambda: all(outcome.result for outcome in outcomes))
        assert all("no prefill instance answers" in outcome.reason for outcome in outcomes)
        assert len(prefill.thread.peers) == 1


def test_an_address_beyond_loopback_needs_keys_on_the_decode_side_too() -> None:
    decode = DecodeSide(CONFIG)
    with stopped(decode):
        for room, host in ((1, "192.0.2.1"), (2, "prefill.example.org")):
            result = decode.announce(room, [f"tcp://{host}:9"])
            wait_for(lambda result=result: bool(result.result), 2.0)
            assert "keys" in result.reason
