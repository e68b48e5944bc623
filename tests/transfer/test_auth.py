"""Beyond loopback nothing goes without keys, and nothing to unknown ones."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

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


def test_nobody_gets_in_when_the_authenticator_has_stopped(tmp_path: Path) -> None:
    """The stranger knows the prefill instance's public key."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    make_keys(ours, ["decode"])
    make_keys(theirs, ["decode"])
    (theirs / "prefill.key").write_bytes((ours / "prefill.key").read_bytes())
    prefill = PrefillSide(TransferConfig(keys=ours))
    stranger = DecodeSide(TransferConfig(keys=theirs))
    with stopped(prefill, stranger):
        curve = prefill.thread._listener._curve
        assert curve is not None
        curve.authenticator.stop()
        stranger.announce(1, [prefill.endpoint])
        with pytest.raises(AssertionError):
            wait_for(lambda: bool(prefill.thread.peers), 2.0)


def test_a_key_that_others_may_read_is_not_loaded(tmp_path: Path) -> None:
    make_keys(tmp_path, ["decode"])
    decode = DecodeSide(TransferConfig(keys=tmp_path))
    with stopped(decode):
        (tmp_path / "decode.key_secret").chmod(0o640)
        result = decode.announce(1, ["tcp://127.0.0.1:9"])
        wait_for(lambda: bool(result.result), 2.0)
        assert "chmod 600" in result.reason
    (tmp_path / "prefill.key_secret").chmod(0o604)
    with pytest.raises(ConfigError, match="others may read prefill"):
        PrefillSide(TransferConfig(keys=tmp_path))


def test_a_secret_key_is_never_readable_by_others(tmp_path: Path) -> None:
    """Not even between its creation and the end of `make_keys`, whatever the umask."""
    modes: list[int] = []
    open_file = os.open

    def watch(path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        descriptor = open_file(path, flags, mode, **options)
        if str(path).endswith("key_secret"):
            modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor

    old = os.umask(0)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "open", watch)
            make_keys(tmp_path, ["decode"])
    finally:
        os.umask(old)
    assert modes == [0o600, 0o600]
