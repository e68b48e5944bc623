"""How a transfer ends when somebody is slow, silent, aborts or stops."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.transfer.decode import client
from sgl_kvq.transfer.options import TransferConfig
from sgl_kvq.transfer.prefill import pace
from tests.support.proxy import Proxy
from tests.support.sink_rows import give_sink_rows
from tests.support.transfer_pair import (
    DecodeSide,
    PrefillSide,
    assert_equal,
    ship,
    stopped,
    take_pages,
    wait_for,
)

CONFIG = TransferConfig(deadline_s=4.0, block_bytes=16384, window_bytes=65536)


def test_pages_written_while_they_are_sent_are_never_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are sent from where they lie; SGLang frees them, another request writes them."""
    monkeypatch.setattr(pace, "START_BYTES", 2**25)  # as after many transfers
    monkeypatch.setattr(client, "STRANGER_BYTES", 2**25)
    config = TransferConfig(deadline_s=10.0, block_bytes=2**20)
    prefill, decode = (side(config, format_name="bf16") for side in (PrefillSide, DecodeSide))
    proxy = Proxy(prefill.thread.port)
    pages = torch.arange(1, 61)  # 12 MB, more than the sockets' buffers take
    with stopped(prefill, decode):
        for pool in (prefill.pool, decode.pool):
            give_sink_rows(pool, pages[:1])
        prefill.open(1)
        decode.announce(1, [proxy.endpoint])
        decode.start(1, pages)
        wait_for(lambda: 1 in prefill.requested)
        original = [layer.pages.clone() for layer in prefill.pool.layers]
        untouched = [layer.pages.clone() for layer in decode.pool.layers]
        proxy.stalled.set()
        prefill.send(1, pages, len(pages) * PAGE_SIZE)
        wait_for(lambda: prefill.thread.rooms[1].bytes_sent > 11_000_000)
        for layer in prefill.pool.layers:  # no abort is sent: the worst order of events
            layer.pages.fill_(0x55)
        prefill.outcomes[1].state.fail("aborted")
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
        wait_for(lambda: 1 in prefill.requested)
        slow.thread.post(gate.wait)  # it takes nothing from its socket from now on
        prefill.send(1, sent, num_tokens)
        give_sink_rows(prefill.pool, torch.tensor([60]))
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
        assert 3.5 < time.monotonic() - began < 7.0
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
            wait_for(lambda room=room: room in prefill.requested)
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
        wait_for(lambda: 1 in prefill.requested)
        decode.outcomes[1].state.fail("ended")
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


def test_a_room_that_the_prefill_instance_refused_is_refused_to_whoever_asks() -> None:
    """Of several requests with one room, one is served; the others end at once on both sides."""
    prefill, decode = PrefillSide(CONFIG), DecodeSide(CONFIG)
    with stopped(prefill, decode):
        ship(prefill, decode, 1, 200)
        prefill.thread.refuse_room(1, "room 1 is taken")
        result = decode.announce(1, [prefill.endpoint])
        decode.start(1, take_pages(decode.pool, 200, 40))
        wait_for(lambda: bool(result.result), 1.0)
        assert "room 1 is taken" in result.reason
        decode.close(1)
        ship(prefill, decode, 2, 200, first=10)
        # So is one that asked before its request was refused.
        result = decode.announce(3, [prefill.endpoint])
        decode.start(3, take_pages(decode.pool, 200, 50))
        wait_for(lambda: 3 in prefill.thread.rooms)
        prefill.thread.refuse_room(3, "room 3 is taken")
        wait_for(lambda: bool(result.result), 1.0)
        assert "room 3 is taken" in result.reason
        decode.close(3)
        # The room of a request that came later is served.
        result = decode.announce(1, [prefill.endpoint])
        out = prefill.open(1)
        wait_for(lambda: 1 in prefill.thread.rooms)
        decode.start(1, take_pages(decode.pool, 200, 44))
        wait_for(lambda: 1 in prefill.requested[-1:])
        assert not out.result
        assert not result.result


def test_a_command_after_the_end_writes_to_no_descriptor() -> None:
    """The number of the thread's descriptor may belong to somebody else by then."""
    decode = DecodeSide(CONFIG)
    with stopped(decode):
        pass
    wake = decode.thread.environment._wake
    other = os.eventfd(0, os.EFD_NONBLOCK)
    os.dup2(other, wake)
    try:
        decode.thread.post(lambda: None)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(other)
    finally:
        for descriptor in {other, wake}:
            os.close(descriptor)


def test_a_failing_piece_of_work_ends_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, decode = PrefillSide(CONFIG), DecodeSide(CONFIG)
    work, failed = prefill.thread.work, []

    def fail_once() -> bool:
        if not failed:
            failed.append(True)
            raise RuntimeError("once")
        return work()

    with stopped(prefill, decode):
        monkeypatch.setattr(prefill.thread, "work", fail_once)
        ship(prefill, decode, 1, 200)
        assert failed
