"""Connections that cannot be opened again, and connections with very many rooms."""

from __future__ import annotations

import errno
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import zmq
from zmq.utils.monitor import recv_monitor_message

from sgl_kvq.transfer.options import TransferConfig
from sgl_kvq.transfer.protocol.messages import ALIVE_ROOMS, alive_messages, pack_message
from tests.support.proxy import Proxy
from tests.support.transfer_pair import DecodeSide, PrefillSide, stopped, take_pages, wait_for

CONFIG = TransferConfig(deadline_s=4.0, block_bytes=16384, window_bytes=65536)


def test_a_connection_that_cannot_be_opened_again_fails_its_rooms() -> None:
    """No descriptor is left; whoever waits for pages and whoever has some is told at once."""

    def make_socket(kind: int) -> Any:
        raise zmq.ZMQError(errno.EMFILE)

    prefill, decode = PrefillSide(CONFIG), DecodeSide(CONFIG)
    proxy = Proxy(prefill.thread.port)
    with stopped(prefill, decode):
        started = decode.announce(1, [proxy.endpoint])
        waiting = decode.announce(2, [proxy.endpoint])
        decode.wait_ready(proxy.endpoint)
        decode.start(1, take_pages(decode.pool, 300, 1))
        decode.thread.environment.make_socket = make_socket  # type: ignore[method-assign]
        proxy.cut()
        wait_for(lambda: bool(started.result and waiting.result), 2.0)
        for outcome in (started, waiting):
            assert "cannot connect again" in outcome.reason
            assert "open files" in outcome.reason
        assert not decode.thread.connections
        proxy.close()


@pytest.mark.parametrize("polled", [False, True])
def test_nothing_of_an_older_connection_is_read_after_a_newer_one(polled: bool) -> None:
    """The protocol relies on it: ZeroMQ drops what the older one left, or changes its id."""
    received: list[bytes] = []
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        with router.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED) as monitor:
            for name in (b"old", b"new"):
                with context.socket(zmq.DEALER) as dealer:
                    dealer.setsockopt(zmq.ROUTING_ID, b"peer")
                    dealer.connect(f"tcp://127.0.0.1:{port}")
                    for _ in range(3):
                        dealer.send(name)
                    assert monitor.poll(5000)
                    recv_monitor_message(monitor)
                    if polled:
                        assert router.poll(5000)  # ZeroMQ takes the first message for that
        while received.count(b"new") < 3:
            assert router.poll(5000)
            identity, name = router.recv_multipart()
            if identity == b"peer":
                received.append(name)
    assert received == [b"old"] * polled + [b"new"] * 3


def test_any_number_of_rooms_fits_messages() -> None:
    for count in (0, 1, ALIVE_ROOMS, ALIVE_ROOMS + 1, 50_000):
        rooms = [[2**64 - 1 - i, 2**64 - 1] for i in range(count)]
        messages = alive_messages(rooms)
        for message in messages:
            pack_message(message)
        assert messages
        assert [pair for message in messages for pair in message.rooms] == rooms


@pytest.mark.parametrize("count", [15_000, pytest.param(50_000, marks=pytest.mark.long)])
def test_very_many_queued_rooms_all_end(count: int) -> None:
    """None expires while it waits for pages for longer than the deadline; each is served then."""
    # Announcements queue up behind this loop: on a busy machine the first took more than 4 s.
    config = replace(CONFIG, deadline_s=12.0)
    prefill, decode = PrefillSide(config), DecodeSide(config)
    nothing = torch.zeros(0, dtype=torch.int64)
    with stopped(prefill, decode):
        rooms = range(2**62, 2**62 + count)  # as large as SGLang's random ones
        for room in rooms:
            prefill.open(room)
            decode.announce(room, [prefill.endpoint])
        time.sleep(1.5 * config.deadline_s)
        for outcomes in (prefill.outcomes, decode.outcomes):
            assert not {outcome.reason for outcome in outcomes.values() if outcome.result}
        began = time.monotonic()
        for first in range(0, count, 1000):
            batch = rooms[first : first + 1000]
            for room in batch:
                decode.start(room, nothing)
                prefill.send(room, nothing, 0)
            ended = [side.outcomes[room] for side in (prefill, decode) for room in batch]
            wait_for(lambda ended=ended: all(outcome.result for outcome in ended), 30.0)
            for room in batch:
                decode.close(room)
                prefill.close(room)
        print(f"{count} rooms served in {time.monotonic() - began:.1f} s")
        for outcomes in (prefill.outcomes, decode.outcomes):
            wait_for(lambda o=outcomes: all(outcome.result for outcome in o.values()))
            assert {outcome.result for outcome in outcomes.values()} == {"success"}
