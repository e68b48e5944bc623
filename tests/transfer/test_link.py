"""Transfers between two pools over real sockets, without servers."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from pair import (
    METADATA,
    NUM_HEADS,
    NUM_LAYERS,
    DecodeSide,
    PrefillSide,
    assert_equal,
    fingerprint,
    make_pool,
    stopped,
    take_pages,
    wait_for,
)
from prometheus_client import REGISTRY
from proxy import Proxy

from sgl_kvq.config import PAGE_SIZE
from sgl_kvq.errors import ConfigError, TransferError, WireError
from sgl_kvq.transfer.auth import make_keys
from sgl_kvq.transfer.blocks import HeadRange, cut_pages, cut_rows, heads_of_rank, run_of
from sgl_kvq.transfer.gpu_access import open_pool
from sgl_kvq.transfer.handshake import check_fingerprint
from sgl_kvq.transfer.link import LinkState
from sgl_kvq.transfer.messages import Hello, Refuse, pack_message, parse_message
from sgl_kvq.transfer.options import TransferConfig
from sgl_kvq.transfer.send_buffers import SendBuffers
from sgl_kvq.transfer.thread import TICK_S
from sgl_kvq.transfer.wire import MAX_BLOCK_BYTES, WIRE_VERSION, BlockKind

CONFIG = TransferConfig(deadline_s=3.0, block_bytes=16384, window_bytes=65536)


def ship(
    prefill: PrefillSide, decode: DecodeSide, room: int, num_tokens: int, first: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """One whole transfer; returns the pages on both sides."""
    sent = take_pages(prefill.pool, num_tokens, first)
    got = take_pages(decode.pool, num_tokens, first + 20)
    out = prefill.open(room)
    result = decode.announce(room, [prefill.endpoint])
    decode.start(room, got)
    prefill.send(room, sent, num_tokens)
    wait_for(lambda: bool(out.result and result.result))
    assert (out.result, result.result) == ("success", "success"), (out.reason, result.reason)
    prefill.close(room)
    decode.close(room)
    return sent, got


@pytest.mark.parametrize("format_name", ["hack2", "hack4", "bf16", "chosen"])
def test_every_byte_arrives_and_no_other_is_touched(format_name: str) -> None:
    prefill = PrefillSide(CONFIG, format_name=format_name)
    decode = DecodeSide(CONFIG, format_name=format_name)
    with stopped(prefill, decode):
        for room, num_tokens in enumerate((1, 63, 64, 65, 1000), 1):
            touched = torch.zeros(decode.pool.plan.num_pages + 1, dtype=torch.bool)
            before = [layer.pages.clone() for layer in decode.pool.layers]
            sent, got = ship(prefill, decode, room, num_tokens)
            assert_equal(prefill, sent, decode, got, num_tokens)
            assert decode.metadata[room] == METADATA
            touched[got] = True
            for layer, old in zip(decode.pool.layers, before, strict=True):
                assert torch.equal(layer.pages[~touched], old[~touched])
            for pool, pages in ((prefill.pool, sent), (decode.pool, got)):
                pool.open_slots.release(pages)
                pool.sink_slots.release(pages)
        wait_for(lambda: not prefill.thread.rooms)
        assert all(not link.in_use for link in decode.thread.links.values())
        assert all(peer.bytes_in_flight == 0 for peer in prefill.thread.peers.values())


@pytest.mark.parametrize(("prefill_tp", "decode_tp"), [(1, 2), (2, 1), (4, 2), (2, 4)])
def test_tensor_parallel_sizes_may_differ(prefill_tp: int, decode_tp: int) -> None:
    num_tokens, room = 500, 7
    senders = [PrefillSide(CONFIG, (prefill_tp, rank), seed=rank + 1) for rank in range(prefill_tp)]
    receivers = [DecodeSide(CONFIG, (decode_tp, rank)) for rank in range(decode_tp)]
    with stopped(*senders, *receivers):
        sent = [take_pages(side.pool, num_tokens, 1) for side in senders]
        got = [take_pages(side.pool, num_tokens, 11) for side in receivers]
        outcomes = [side.open(room) for side in senders]
        for receiver, pages in zip(receivers, got, strict=True):
            sources = [s for s in senders if s.heads.intersect(receiver.heads).count]
            outcomes.append(receiver.announce(room, [source.endpoint for source in sources]))
            receiver.start(room, pages, peers=max(1, decode_tp // prefill_tp))
        for side, pages in zip(senders, sent, strict=True):
            side.send(room, pages, num_tokens)
        wait_for(lambda: all(outcome.result for outcome in outcomes))
        assert {outcome.result for outcome in outcomes} == {"success"}
        for side, pages in zip(senders, sent, strict=True):
            for receiver, places in zip(receivers, got, strict=True):
                assert_equal(side, pages, receiver, places, num_tokens)


@pytest.mark.parametrize("codec", ["identity", "lz4", "zstd"])
def test_codecs(codec: str) -> None:
    config = TransferConfig(deadline_s=3.0, block_bytes=16384, codec=codec)
    prefill, decode = PrefillSide(config), DecodeSide(CONFIG)
    with stopped(prefill, decode):
        sent, got = ship(prefill, decode, 1, 300)
        assert_equal(prefill, sent, decode, got, 300)


def test_pages_that_are_there_are_not_sent() -> None:
    prefill, decode = PrefillSide(CONFIG), DecodeSide(CONFIG)
    with stopped(prefill, decode):
        num_tokens, prefix = 600, 4
        sent = take_pages(prefill.pool, num_tokens, 1)
        got = take_pages(decode.pool, num_tokens, 20)
        before = [layer.pages.clone() for layer in decode.pool.layers]
        out = prefill.open(5)
        result = decode.announce(5, [prefill.endpoint])
        decode.start(5, got[prefix:], prefix)
        prefill.send(5, sent[prefix:], num_tokens, prefix)
        wait_for(lambda: bool(out.result and result.result))
        assert result.result == "success", result.reason
        closed = slice(prefix, -1)
        for mine, other, old in zip(prefill.pool.layers, decode.pool.layers, before, strict=True):
            assert torch.equal(mine.pages[sent[closed]], other.pages[got[closed]])
            assert torch.equal(other.pages[got[:prefix]], old[got[:prefix]])
        # And a prompt of which everything is there: only the first token's record travels.
        out, result = prefill.open(6), decode.announce(6, [prefill.endpoint])
        decode.start(6, got[:0], 8)
        prefill.send(6, sent[:0], 0, 8)
        wait_for(lambda: bool(out.result and result.result))
        assert (out.result, result.result) == ("success", "success")
        assert decode.metadata[6] == METADATA


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"weights": "other"}, "weights: prefill same, decode other"),
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
        assert decode.thread.link_state(prefill.endpoint)[0] is LinkState.REFUSED


def test_handshake_compares_everything() -> None:
    """Every field that one side has otherwise, or not at all, is named with both values."""
    mine = fingerprint(make_pool())
    expected = {"format", "page size", "prefill mode", "head_dim", "KV heads", "layers", "weights"}
    assert expected <= set(mine)
    check_fingerprint(mine, dict(mine))
    for name, value in mine.items():
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
        hello = Hello(WIRE_VERSION + 1, 1, prefill.thread.fingerprint)
        socket.send_multipart([b"C", pack_message(hello)])
        assert socket.poll(5000)
        answer = parse_message(socket.recv_multipart()[1])
        assert isinstance(answer, Refuse)
        assert f"prefill {WIRE_VERSION}, decode {WIRE_VERSION + 1}" in answer.reason
        assert not prefill.thread.peers


def test_a_message_of_many_frames_is_dropped() -> None:
    prefill, decode = PrefillSide(CONFIG), DecodeSide(CONFIG)
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.linger = 0
    with stopped(prefill, decode), socket:
        socket.connect(prefill.endpoint)
        refused = prefill.thread.metrics.refused._value.get()
        socket.send_multipart([b"C"] * 1000)
        wait_for(lambda: prefill.thread.metrics.refused._value.get() == refused + 1)
        ship(prefill, decode, 1, 300)


def test_metrics_count_what_went_over_the_wire() -> None:
    def totals(side: str) -> dict[tuple[str, str], float]:
        return {
            (
                sample.name,
                sample.labels.get("kind") or sample.labels.get("result") or "",
            ): sample.value
            for family in REGISTRY.collect()
            for sample in family.samples
            if sample.name.startswith("sgl_kvq:transfer") and sample.labels.get("side") == side
        }

    prefill, decode = PrefillSide(CONFIG), DecodeSide(CONFIG)
    with stopped(prefill, decode):
        before = {side: totals(side) for side in ("prefill", "decode")}
        ship(prefill, decode, 1, 300)
        time.sleep(2 * TICK_S)
        layout = prefill.pool.layout
        for side, old in before.items():
            now = totals(side)

            def gained(name: str, label: str = "", now: Any = now, old: Any = old) -> float:
                key = (f"sgl_kvq:transfer_{name}", label)
                return now.get(key, 0.0) - old.get(key, 0.0)

            assert gained("transfers_total", "success") == 1
            assert gained("wire_bytes_total", "pages") == 3 * 4 * layout.page_bytes
            assert gained("wire_bytes_total", "metadata") == len(METADATA)
            assert gained("wire_bytes_total", "header") == 81 * gained("blocks_total")
            assert gained("closed_page_tokens_total") == 4 * PAGE_SIZE
            assert gained("retries_total") == gained("checksum_failures_total") == 0
            assert gained("state_seconds_count") >= 1


def test_pages_written_while_they_are_sent_are_never_accepted() -> None:
    """They are sent from where they lie; SGLang frees them, another request writes them."""
    config = TransferConfig(deadline_s=10.0, block_bytes=2**20)
    prefill, decode = (side(config, format_name="bf16") for side in (PrefillSide, DecodeSide))
    proxy = Proxy(prefill.thread.port)
    pages = torch.arange(1, 61)  # 12 MB, more than the sockets' buffers take
    with stopped(prefill, decode):
        for pool in (prefill.pool, decode.pool):
            pool.sink_slots.acquire(pages[:1])
        prefill.open(1)
        decode.announce(1, [proxy.endpoint])
        decode.start(1, pages)
        wait_for(lambda: 1 in prefill.asked)
        original = [layer.pages.clone() for layer in prefill.pool.layers]
        untouched = [layer.pages.clone() for layer in decode.pool.layers]
        proxy.stalled.set()
        prefill.send(1, pages, len(pages) * PAGE_SIZE)
        wait_for(lambda: prefill.thread.rooms[1].bytes_sent > 11_000_000)
        for layer in prefill.pool.layers:  # no abort is sent: the worst order of events
            layer.pages.fill_(0x55)
        prefill.outcomes[1].ticket.fail("aborted")
        failures = decode.thread.metrics.checksum_failures._value.get()
        proxy.stalled.clear()
        wait_for(lambda: decode.thread.metrics.checksum_failures._value.get() > failures)
        time.sleep(0.3)
        for mine, other, old in zip(original, decode.pool.layers, untouched, strict=True):
            for page in pages.tolist():
                now = other.pages[page]
                assert torch.equal(now, mine[page]) or torch.equal(now, old[page])
        proxy.close()


def test_a_slow_decode_instance_slows_only_itself() -> None:
    """One peer stops reading; its window fills, the other's transfers go on."""
    config = TransferConfig(deadline_s=30.0, block_bytes=16384, window_bytes=65536)
    prefill, slow, quick = PrefillSide(config), DecodeSide(config), DecodeSide(config)
    with stopped(prefill, slow, quick):
        num_tokens = 1200
        sent = take_pages(prefill.pool, num_tokens, 1)
        gate = threading.Event()
        got = take_pages(slow.pool, num_tokens, 1)
        outcome = prefill.open(1)
        held = slow.announce(1, [prefill.endpoint])
        slow.start(1, got)
        wait_for(lambda: 1 in prefill.asked)
        slow.thread.post(gate.wait)  # it takes nothing from its socket from now on
        prefill.send(1, sent, num_tokens)
        prefill.pool.sink_slots.acquire(torch.tensor([60]))
        began = time.monotonic()
        ship(prefill, quick, 2, 600, first=30)
        assert time.monotonic() - began < 3.0
        peer = max(prefill.thread.peers.values(), key=lambda peer: peer.bytes_in_flight)
        assert config.window_bytes <= peer.bytes_in_flight <= config.window_bytes + 2 * 16384
        assert outcome.result == ""
        gate.set()
        wait_for(lambda: bool(outcome.result and held.result))
        assert outcome.result == "success"
        assert_equal(prefill, sent, slow, got, num_tokens)


def test_a_peer_that_never_asks_or_never_answers_ends_at_the_deadline() -> None:
    prefill, decode = PrefillSide(CONFIG), DecodeSide(CONFIG)
    with stopped(prefill, decode):
        began = time.monotonic()
        alone = prefill.open(1)
        unknown = decode.announce(2, [prefill.endpoint])
        decode.start(2, take_pages(decode.pool, 100, 1))
        nobody = decode.announce(3, ["tcp://127.0.0.1:9"])
        wait_for(lambda: bool(alone.result and unknown.result and nobody.result))
        assert 2.5 < time.monotonic() - began < 6.0
        assert "no decode instance asked" in alone.reason
        assert "did not reach the prefill instance" in unknown.reason or "silent" in unknown.reason
        assert "no prefill instance answers" in nobody.reason
        wait_for(lambda: not prefill.thread.rooms)


def test_abort_reaches_the_other_side() -> None:
    prefill, decode = PrefillSide(CONFIG), DecodeSide(CONFIG)
    with stopped(prefill, decode):
        for room, by in ((1, "prefill"), (2, "decode")):
            out, result = prefill.open(room), decode.announce(room, [prefill.endpoint])
            got = take_pages(decode.pool, 200, 1 + 10 * room)
            decode.start(room, got)
            wait_for(lambda room=room: room in prefill.asked)
            (prefill if by == "prefill" else decode).close(room, "user left")
            other = result if by == "prefill" else out
            wait_for(lambda other=other: bool(other.result), 2.0)
            assert "user left" in other.reason
        wait_for(lambda: not prefill.thread.rooms)


def test_no_byte_is_written_after_the_scheduler_ended_a_transfer() -> None:
    prefill, decode = PrefillSide(CONFIG), DecodeSide(CONFIG)
    with stopped(prefill, decode):
        prefill.open(1)
        decode.announce(1, [prefill.endpoint])
        got = take_pages(decode.pool, 1200, 1)
        decode.start(1, got)
        wait_for(lambda: 1 in prefill.asked)
        decode.outcomes[1].ticket.fail("ended")
        before = [layer.pages.clone() for layer in decode.pool.layers]
        prefill.send(1, take_pages(prefill.pool, 1200, 1), 1200)
        time.sleep(0.5)
        for layer, old in zip(decode.pool.layers, before, strict=True):
            assert torch.equal(layer.pages, old)


def test_threads_and_sockets_are_gone_after_stop() -> None:
    before = threading.active_count()
    files = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        prefill, decode = PrefillSide(CONFIG), DecodeSide(CONFIG)
        with stopped(prefill, decode):
            ship(prefill, decode, 1, 200)
    assert threading.active_count() == before
    wait_for(lambda: len(list(Path("/proc/self/fd").iterdir())) <= files)


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
    keyed = {"deadline_s": 2.0, "block_bytes": 16384}
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


def test_port_in_use_is_one_line() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        with pytest.raises(ConfigError, match=f"cannot listen on port {port}"):
            PrefillSide(TransferConfig(port=port))


def test_a_block_of_layers_with_pages_of_two_sizes_is_refused() -> None:
    pool = make_pool("chosen")
    access = open_pool(pool, HeadRange(0, NUM_HEADS))
    sizes = [layout.page_bytes for layout in pool.plan.layouts]
    blocks = list(cut_pages(0, np.array([5]), sizes, 1 << 20))
    assert [(block.first_layer, block.num_layers) for block in blocks] == [(0, 2), (2, 1)]
    everything = replace(blocks[0], num_layers=NUM_LAYERS)
    with pytest.raises(WireError, match=r"layers 0 to 3: expected pages of one size"):
        access.payload_bytes(everything, access.heads)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 500), max_size=40, unique=True),
    st.lists(st.sampled_from([1, 700, 5000]), min_size=1, max_size=9),
    st.integers(1, 20_000),
)
def test_cutting_covers_every_page_and_layer_once(
    pages: list[int], page_bytes: list[int], block_bytes: int
) -> None:
    places, num_layers = np.array(pages, dtype=np.int64), len(page_bytes)
    seen: list[tuple[int, int]] = []
    for block in cut_pages(3, places, page_bytes, block_bytes):
        (in_layer,) = set(page_bytes[block.first_layer : block.first_layer + block.num_layers])
        size = block.num_layers * block.num_pages * in_layer
        assert size <= block_bytes or (block.num_layers, block.num_pages) == (1, 1)
        positions = range(block.first_page - 3, block.first_page - 3 + block.num_pages)
        assert [pages[i] for i in positions] == block.pages.tolist()
        layers = range(block.first_layer, block.first_layer + block.num_layers)
        seen += [(layer, i) for layer in layers for i in positions]
        run = run_of(block.pages)
        assert (run is not None) == (np.diff(block.pages) == 1).all()
        assert run is None or (np.arange(run.start, run.stop) == block.pages).all()
    assert sorted(seen) == [(layer, i) for layer in range(num_layers) for i in range(len(pages))]


def test_an_open_page_of_a_large_model_fits_the_wire() -> None:
    """80 layers of 8 heads: 20 MB of rows, in blocks within the limit."""
    page = np.array([1])
    row_bytes = 2 * 8 * 128 * 2
    blocks = list(cut_rows(BlockKind.OPEN_ROWS, page, 63, 80, row_bytes, 2**20))
    assert sum(block.num_layers for block in blocks) == 80
    assert max(block.num_layers * 63 * row_bytes for block in blocks) <= MAX_BLOCK_BYTES


def test_buffers_are_used_again_and_all_come_back() -> None:
    buffers = SendBuffers(lambda nbytes: np.empty(nbytes, dtype=np.uint8))
    first, second = buffers.take(100_000), buffers.take(90_000)
    assert second is not first
    assert len(second) == len(first) == 131_072
    buffers.give(first)
    assert buffers.take(70_000) is first

    prefill, decode = PrefillSide(CONFIG), DecodeSide(CONFIG)
    made: list[int] = []
    prefill.thread._buffers._make = lambda nbytes: made.append(nbytes) or np.empty(nbytes, np.uint8)
    with stopped(prefill, decode):
        for room in range(1, 4):
            ship(prefill, decode, room, 1000)
            for pool in (prefill.pool, decode.pool):
                pool.open_slots.release(torch.arange(pool.plan.num_pages))
                pool.sink_slots.release(torch.arange(pool.plan.num_pages))
        wait_for(lambda: not prefill.thread.rooms)
        assert sum(map(len, prefill.thread._buffers._free.values())) == len(made)
        assert len(made) <= CONFIG.window_bytes // CONFIG.block_bytes + 8


def test_heads_of_ranks() -> None:
    assert [heads_of_rank(8, 2, rank) for rank in range(2)] == [HeadRange(0, 4), HeadRange(4, 8)]
    shared = [HeadRange(0, 1), HeadRange(0, 1), HeadRange(1, 2), HeadRange(1, 2)]
    assert [heads_of_rank(2, 4, rank) for rank in range(4)] == shared
    assert PAGE_SIZE == 64
