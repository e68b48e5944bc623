"""What both ends must have in common before anything is sent."""

from __future__ import annotations

import re
from typing import Any

import pytest
import zmq

from sgl_kvq.errors import TransferError
from sgl_kvq.transfer.decode.connections import ConnectionState
from sgl_kvq.transfer.options import TransferConfig
from sgl_kvq.transfer.protocol.handshake import DIGESTS, check_fingerprint
from sgl_kvq.transfer.protocol.header import WIRE_VERSION
from sgl_kvq.transfer.protocol.messages import Hello, Refuse, pack_message, parse_message
from tests.support.transfer_pair import (
    DecodeSide,
    PrefillSide,
    fingerprint,
    make_pool,
    stopped,
    take_pages,
    wait_for,
)

CONFIG = TransferConfig(deadline_s=4.0, block_bytes=16384, window_bytes=65536)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"weights": "other"}, "differ in weights; start"),
        ({"format_name": "hack4"}, "format: prefill hack2, decode hack4"),
    ],
)
def test_handshake_names_both_values(other: dict[str, str], words: str) -> None:
    prefill, decode = PrefillSide(CONFIG), DecodeSide(CONFIG, **other)
    with stopped(prefill, decode):
        prefill.open(1)
        result = decode.announce(1, [prefill.endpoint])
        wait_for(lambda: bool(result.result))
        assert words in result.reason
        assert decode.thread.connection_state(prefill.endpoint)[0] is ConnectionState.REFUSED


def test_handshake_compares_everything() -> None:
    """Every field that one side has otherwise, or not at all, is named with both values."""
    mine = fingerprint(make_pool())
    expected = {"format", "page size", "prefill mode", "head_dim", "KV heads", "layers", "weights"}
    assert expected <= set(mine)
    check_fingerprint(mine, dict(mine))
    for name, value in mine.items():
        if name in DIGESTS:
            with pytest.raises(TransferError, match=f"differ in {name};") as refusal:
                check_fingerprint(mine, mine | {name: "7x"})
            assert "7x" not in str(refusal.value)
            continue
        with pytest.raises(TransferError, match=re.escape(f"{name}: prefill {value}, decode 7x")):
            check_fingerprint(mine, mine | {name: "7x"})
        with pytest.raises(
            TransferError, match=re.escape(f"{name}: prefill unset, decode {value}")
        ):
            check_fingerprint({k: v for k, v in mine.items() if k != name}, mine)


def test_handshake_compares_every_layer() -> None:
    mine, other = fingerprint(make_pool("chosen")), fingerprint(make_pool("kvq2"))
    assert mine["format"] == other["format"] == "kvq2"
    with pytest.raises(
        TransferError, match=r"K coding: prefill by layer, digest .*, decode Coding"
    ):
        check_fingerprint(mine, other)


def test_another_wire_version_is_refused_with_both_versions() -> None:
    prefill = PrefillSide(CONFIG)
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.linger = 0
    with stopped(prefill), socket:
        socket.connect(prefill.endpoint)
        hello = Hello(WIRE_VERSION + 1, 1, prefill.thread.fingerprint, [])
        socket.send_multipart([b"C", pack_message(hello)])
        assert socket.poll(5000)
        answer = parse_message(socket.recv_multipart()[1])
        assert isinstance(answer, Refuse)
        assert f"prefill {WIRE_VERSION}, decode {WIRE_VERSION + 1}" in answer.reason
        assert not prefill.thread.peers


@pytest.mark.parametrize(
    ("on_prefill", "on_decode", "words"),
    [
        ((range(290),), (range(310),), "prefill has 290 tokens, decode 310"),
        ((range(300),), (range(1, 301),), "both have 300 tokens, but other ids"),
        (
            (range(300), "v2"),
            (range(300), "default"),
            "prefill serves version 'v2', decode 'default'",
        ),
    ],
)
@pytest.mark.parametrize("first", ["prefill", "decode"])
def test_other_prompts_fail_on_both_sides_before_a_block_leaves(
    on_prefill: tuple[Any, ...], on_decode: tuple[Any, ...], words: str, first: str
) -> None:
    """Token ids or weights differ, page counts do not; whoever gets the request first."""
    prefill, decode = PrefillSide(CONFIG), DecodeSide(CONFIG)
    with stopped(prefill, decode):
        sent, got = take_pages(prefill.pool, 300, 1), take_pages(decode.pool, 300, 20)
        out = prefill.open(1, *on_prefill) if first == "prefill" else None
        result = decode.announce(1, [prefill.endpoint])
        decode.start(1, got, 0, 1, *on_decode)
        wait_for(lambda: bool(out and out.result) or 1 in prefill.thread.rooms)
        out = out or prefill.open(1, *on_prefill)
        prefill.send(1, sent, 300)
        wait_for(lambda: bool(out.result and result.result))
        assert (out.result, result.result) == ("failed", "failed")
        assert words in out.reason
        assert words in result.reason
        assert bool((decode.pool.layers[0].pages == 0xEE).all())
