"""Codecs: each restores its payload, a hostile one costs nothing, both sides agree before use."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_kvq.errors import CodecError, WireError
from sgl_kvq.memory_pool.page_io.span import Buffer
from sgl_kvq.transfer.codecs import registry
from sgl_kvq.transfer.codecs.base import Codec
from sgl_kvq.transfer.codecs.registry import all_codecs, decode_payload, get_codec, register
from sgl_kvq.transfer.codecs.zstd import Zstd
from sgl_kvq.transfer.decode import client
from sgl_kvq.transfer.decode.connections import ConnectionState
from sgl_kvq.transfer.options import TransferConfig
from tests.support.transfer_pair import (
    DecodeSide,
    PrefillSide,
    assert_equal,
    ship,
    stopped,
    take_pages,
    wait_for,
)

CONFIG = TransferConfig(deadline_s=4.0, block_bytes=16384)
CODECS = all_codecs()


class Inverted(Codec):
    """A third party's codec: every bit flipped."""

    id, name = 200, "inverted"

    def encode(self, payload: Buffer) -> Buffer:
        return bytes(byte ^ 255 for byte in payload)

    def decode(self, data: Buffer, raw_bytes: int) -> Buffer:
        return self.encode(data)


@pytest.fixture
def inverted() -> Iterator[Codec]:
    codec = Inverted()
    register(codec)
    yield codec
    del registry._BY_ID[codec.id]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@settings(max_examples=50, deadline=None)
@given(payload=st.binary(max_size=2000))
def test_codecs_round_trip(codec: Codec, payload: bytes) -> None:
    sent = bytes(codec.encode(payload))
    assert bytes(decode_payload(codec.id, sent, len(payload))) == payload
    with pytest.raises(CodecError):
        decode_payload(codec.id, sent, len(payload) + 1)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@settings(max_examples=100, deadline=None)
@given(payload=st.binary(max_size=200), size=st.integers(0, 4096))
def test_codecs_survive_anything(codec: Codec, payload: bytes, size: int) -> None:
    with contextlib.suppress(WireError):
        assert len(decode_payload(codec.id, payload, size)) == size


def test_a_bomb_does_not_fill_the_memory() -> None:
    """64 MiB of zeros behind a header that announces 1 KiB."""
    for codec in CODECS[1:]:
        bomb = bytes(codec.encode(bytes(64 * 2**20)))
        with pytest.raises(CodecError):
            decode_payload(codec.id, bomb, 1024)
    with pytest.raises(CodecError, match="expected an id"):
        decode_payload(77, b"", 0)


@pytest.mark.parametrize("codec", ["identity", "lz4", "zstd"])
def test_every_byte_arrives(codec: str) -> None:
    config = TransferConfig(deadline_s=4.0, block_bytes=16384, codec=codec)
    prefill, decode = PrefillSide(config), DecodeSide(CONFIG)
    with stopped(prefill, decode):
        sent, got = ship(prefill, decode, 1, 300)
        assert_equal(prefill, sent, decode, got, 300)


def test_a_registered_codec_is_used(inverted: Codec) -> None:
    assert get_codec("inverted") is inverted
    with pytest.raises(ValueError, match="is registered"):
        register(Inverted())
    config = TransferConfig(deadline_s=4.0, block_bytes=16384, codec="inverted")
    prefill, decode = PrefillSide(config), DecodeSide(CONFIG)
    with stopped(prefill, decode):
        sent, got = ship(prefill, decode, 1, 300)
        assert_equal(prefill, sent, decode, got, 300)


def test_a_codec_of_another_package_is_found(tmp_path: Path) -> None:
    dist_info = tmp_path / "other-1.dist-info"
    dist_info.mkdir()
    (dist_info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (dist_info / "entry_points.txt").write_text("[sgl_kvq.codecs]\ninverted = other:Inverted\n")
    (tmp_path / "other.py").write_text(
        "from sgl_kvq.transfer.codecs.identity import Identity\n\n\n"
        "class Inverted(Identity):\n    id, name = 200, 'inverted'\n"
    )
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    program = "from sgl_kvq.transfer.codecs.registry import codec_names; print(codec_names())"
    answer = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        timeout=120,
    )
    assert "'inverted'" in answer.stdout


def test_a_codec_that_the_other_side_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "decodable", lambda: ["identity", "lz4"])
    config = TransferConfig(deadline_s=4.0, block_bytes=16384, codec="zstd")
    prefill, decode = PrefillSide(config), DecodeSide(CONFIG)
    with stopped(prefill, decode):
        prefill.open(1)
        result = decode.announce(1, [prefill.endpoint])
        wait_for(lambda: bool(result.result), 2.0)
        assert decode.thread.connection_state(prefill.endpoint)[0] is ConnectionState.REFUSED
        assert "--kv-quant-transfer-codec zstd" in result.reason
        assert "identity, lz4" in result.reason
        assert result.reason.endswith("pip install zstandard")
        assert "\n" not in result.reason


def test_a_block_that_cannot_be_decoded_ends_the_transfer_on_both_sides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is neither sent again for ever nor left to the deadline."""

    def decode_nothing(self: Zstd, data: Buffer, raw_bytes: int) -> Buffer:
        raise ImportError("no zstandard here")

    monkeypatch.setattr(Zstd, "decode", decode_nothing)
    config = TransferConfig(deadline_s=60.0, block_bytes=16384, codec="zstd")
    prefill, decode = PrefillSide(config), DecodeSide(CONFIG)
    with stopped(prefill, decode):
        out, result = prefill.open(1), decode.announce(1, [prefill.endpoint])
        decode.start(1, take_pages(decode.pool, 1000, 1))
        wait_for(lambda: 1 in prefill.requested)
        began = time.monotonic()
        prefill.send(1, take_pages(prefill.pool, 1000, 1), 1000)
        wait_for(lambda: bool(out.result and result.result), 3.0)
        assert time.monotonic() - began < 3.0
        assert (out.result, result.result) == ("failed", "failed")
        for reason in (out.reason, result.reason):
            assert "codec zstd" in reason
            assert "no zstandard here" in reason
        wait_for(lambda: not prefill.thread.rooms)
