"""Transfers between two pools over real sockets, without servers."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import zmq
from prometheus_client import REGISTRY

from sgl_kvq.errors import ConfigError
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.transfer.options import TransferConfig
from sgl_kvq.transfer.protocol.header import HEADER_BYTES
from sgl_kvq.transfer.runtime.event_loop import TICK_S
from tests.support.sink_rows import take_back
from tests.support.transfer_pair import (
    METADATA,
    DecodeSide,
    PrefillSide,
    assert_equal,
    ship,
    stopped,
    take_pages,
    wait_for,
)

CONFIG = TransferConfig(deadline_s=4.0, block_bytes=16384, window_bytes=65536)


@pytest.mark.parametrize("format_name", ["hack2", "hack4", "bf16", "chosen"])
def test_every_byte_arrives_and_no_other_is_touched(format_name: str) -> None:
    prefill = PrefillSide(CONFIG, format_name=format_name)
    decode = DecodeSide(CONFIG, format_name=format_name)
    with stopped(prefill, decode):
        for room, num_tokens in enumerate((1, 63, 64, 65, 1000), 1):
            touched = torch.zeros(decode.pool.plan.num_rows + 1, dtype=torch.bool)
            before = [layer.pages.clone() for layer in decode.pool.layers]
            sent, got = ship(prefill, decode, room, num_tokens)
            assert_equal(prefill, sent, decode, got, num_tokens)
            assert decode.metadata[room] == METADATA
            touched[got] = True
            touched[decode.pool.sink_pages.held_slot(got[:1])] = True
            for layer, old in zip(decode.pool.layers, before, strict=True):
                assert torch.equal(layer.pages[~touched], old[~touched])
            for pool, pages in ((prefill.pool, sent), (decode.pool, got)):
                take_back(pool, pages)
        wait_for(lambda: not prefill.thread.rooms)
        assert all(not connection.in_use for connection in decode.thread.connections.values())
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
            assert gained("wire_bytes_total", "header") == HEADER_BYTES * gained("blocks_total")
            assert gained("closed_page_tokens_total") == pytest.approx(4 * PAGE_SIZE)
            assert gained("retries_total") == gained("checksum_failures_total") == 0
            assert gained("state_seconds_count") >= 1


def test_port_in_use_is_one_line() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        with pytest.raises(ConfigError, match=f"cannot listen on port {port}"):
            PrefillSide(TransferConfig(port=port))
