"""What a network does to a transfer: it ends in time, right or with a clear error, alone."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest
import torch
import zmq

from sgl_kvq.transfer.options import TransferConfig
from sgl_kvq.transfer.prefill import sender
from sgl_kvq.transfer.protocol.header import (
    HEADER_BYTES,
    WIRE_VERSION,
    BlockHeader,
    pack_header,
    parse_header,
)
from sgl_kvq.transfer.protocol.messages import Ack, Done, Hello, Nack, Request, pack_message
from sgl_kvq.transfer.runtime import workers
from tests.support.proxy import Proxy
from tests.support.transfer_pair import (
    DecodeSide,
    Outcome,
    PrefillSide,
    assert_equal,
    stopped,
    take_pages,
    transfer_threads,
    wait_for,
)

CONFIG = TransferConfig(deadline_s=6.0, block_bytes=16384, window_bytes=131072, workers=2)
NUM_TOKENS = 1000


class Lab:
    """A prefill rank, a proxy, a decode rank behind it and one beside it."""

    def __init__(self) -> None:
        self.prefill = PrefillSide(CONFIG)
        self.proxy = Proxy(self.prefill.thread.port)
        self.decode = DecodeSide(CONFIG)
        self.direct = DecodeSide(CONFIG)
        self.sent = take_pages(self.prefill.pool, NUM_TOKENS, 1)

    def begin(self, room: int, side: DecodeSide, endpoint: str) -> tuple[Outcome, Outcome, Any]:
        out, result = self.prefill.open(room), side.announce(room, [endpoint])
        got = take_pages(side.pool, NUM_TOKENS, 1 + 16 * (room % 3))
        side.start(room, got)
        return out, result, got

    def finish(self, out: Outcome, result: Outcome) -> None:
        wait_for(lambda: bool(out.result and result.result), 3 * CONFIG.deadline_s)

    def others_go_on(self, room: int) -> None:
        out, result, got = self.begin(room, self.direct, self.prefill.endpoint)
        self.prefill.send(room, self.sent, NUM_TOKENS)
        wait_for(lambda: bool(out.result and result.result), 3.0)
        assert result.result == "success"
        assert_equal(self.prefill, self.sent, self.direct, got, NUM_TOKENS)
        self.direct.close(room)

    def nothing_is_left(self) -> None:
        wait_for(lambda: not self.prefill.thread.rooms, 3 * CONFIG.deadline_s)
        for room in self.decode.outcomes:
            self.decode.close(room)
        wait_for(
            lambda: (
                not any(connection.in_use for connection in self.decode.thread.connections.values())
            )
        )
        assert all(peer.bytes_in_flight == 0 for peer in self.prefill.thread.peers.values())


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """With workers for full blocks and without for others, and no thread left behind."""
    monkeypatch.setattr(workers, "MIN_POOLED_BYTES", 12_000)
    lab = Lab()
    with stopped(lab.prefill, lab.decode, lab.direct):
        yield lab
        lab.proxy.close()
    assert not transfer_threads()


def flip(data: bytes) -> bytes:
    place = random.Random(0).randrange(1000, 3000)
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [flip, lambda data: b"", lambda data: data[: len(data) // 2], lambda data: data + data],
    ids=["flipped byte", "dropped", "truncated", "doubled"],
)
def test_damaged_stream_is_repaired(lab: Lab, damage: Callable[[bytes], bytes]) -> None:
    out, result, got = lab.begin(1, lab.decode, lab.proxy.endpoint)
    wait_for(lambda: 1 in lab.prefill.requested)
    lab.proxy.damage_once(damage)
    lab.prefill.send(1, lab.sent, NUM_TOKENS)
    lab.others_go_on(2)
    lab.finish(out, result)
    assert (out.result, result.result) == ("success", "success"), (out.reason, result.reason)
    assert_equal(lab.prefill, lab.sent, lab.decode, got, NUM_TOKENS)
    lab.nothing_is_left()


def test_a_bad_block_alone_is_sent_again(lab: Lab) -> None:
    """The stream is whole, one payload is not: a checksum failure and one retry."""
    out, result, got = lab.begin(1, lab.decode, lab.prefill.endpoint)
    damaged: list[int] = []
    damage_fourth_block(lab.decode, damaged)
    lab.prefill.send(1, lab.sent, NUM_TOKENS)
    lab.finish(out, result)
    assert result.result == "success"
    assert damaged == [3]
    assert_equal(lab.prefill, lab.sent, lab.decode, got, NUM_TOKENS)


def test_a_bad_header_hurts_its_own_block(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks beside it in its message are taken, it alone is sent again."""
    pack, damaged, most_frames = sender.pack_header, [], 0
    take = lab.decode.thread.on_frames
    retries = lab.prefill.thread.metrics.retries._value

    def damage_once(header: BlockHeader) -> bytes:
        data = bytearray(pack(header))
        if header.seq == 3 and not damaged:
            damaged.append(header.seq)
            data[50] ^= 4
        return bytes(data)

    def on_frames(socket: Any, frames: list[Any]) -> None:
        nonlocal most_frames
        most_frames = max(most_frames, len(frames))
        take(socket, frames)

    monkeypatch.setattr(sender, "pack_header", damage_once)
    monkeypatch.setattr(lab.decode.thread, "on_frames", on_frames)
    before = retries.get()
    out, result, got = lab.begin(1, lab.decode, lab.prefill.endpoint)
    lab.prefill.send(1, lab.sent, NUM_TOKENS)
    lab.finish(out, result)
    assert result.result == "success"
    assert damaged == [3]
    assert retries.get() == before + 1
    assert most_frames > 3  # several blocks in a message
    assert_equal(lab.prefill, lab.sent, lab.decode, got, NUM_TOKENS)


def damage_fourth_block(side: DecodeSide, seen: list[int]) -> None:
    """Flip a bit of the fourth block right before the decode rank looks at it."""
    receiver = side.thread._receiver
    original = receiver._claim

    def claim(connection: Any, header: BlockHeader, payload: memoryview) -> Any:
        data = bytearray(payload)
        if header.seq == 3 and not seen:
            seen.append(header.seq)
            data[100] ^= 4
        return original(connection, header, memoryview(data))

    receiver._claim = claim  # type: ignore[method-assign]


@pytest.mark.parametrize("after_bytes", [0, 100, 400, 30_000, 100_000])
def test_cut_connection_at_every_stage(lab: Lab, after_bytes: int) -> None:
    lab.proxy.bytes_per_s = 2_000_000

    def cut() -> None:
        wait_for(lambda: lab.proxy.passed_bytes >= after_bytes)
        lab.proxy.cut()

    cutter = threading.Thread(target=cut)
    cutter.start()
    out, result, got = lab.begin(1, lab.decode, lab.proxy.endpoint)
    lab.prefill.send(1, lab.sent, NUM_TOKENS)
    cutter.join()
    lab.others_go_on(2)
    lab.finish(out, result)
    assert (out.result, result.result) == ("success", "success"), (out.reason, result.reason)
    assert_equal(lab.prefill, lab.sent, lab.decode, got, NUM_TOKENS)
    lab.nothing_is_left()


def test_a_stall_beyond_the_deadline_ends_on_both_sides(lab: Lab) -> None:
    out, result, _ = lab.begin(1, lab.decode, lab.proxy.endpoint)
    wait_for(lambda: 1 in lab.prefill.requested)
    lab.proxy.stalled.set()
    lab.proxy.refusing = True
    began = time.monotonic()
    lab.prefill.send(1, lab.sent, NUM_TOKENS)
    lab.others_go_on(2)
    lab.finish(out, result)
    assert time.monotonic() - began < CONFIG.deadline_s + 4
    assert "silent" in result.reason
    assert "silent" in out.reason or "gave up" in out.reason
    lab.proxy.stalled.clear()
    lab.nothing_is_left()


def test_a_restarted_prefill_instance_is_noticed(lab: Lab) -> None:
    out, result, _ = lab.begin(1, lab.decode, lab.proxy.endpoint)
    wait_for(lambda: 1 in lab.prefill.requested)
    port = lab.prefill.thread.port
    lab.prefill.thread.stop()
    assert out.result == "failed"
    successor = PrefillSide(dataclasses.replace(CONFIG, port=port))
    with stopped(successor):
        wait_for(lambda: bool(result.result), CONFIG.deadline_s)
    assert "restarted" in result.reason or "shutting down" in result.reason


def raw_peer(lab: Lab, identity: bytes = b"stranger") -> zmq.Socket[bytes]:
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.linger = 0
    socket.setsockopt(zmq.ROUTING_ID, identity)
    socket.connect(lab.prefill.endpoint)
    return socket


def test_messages_of_another_peer_change_nothing(lab: Lab) -> None:
    """A peer that passed the handshake cannot end, acknowledge or take another's transfer."""
    out, result, got = lab.begin(1, lab.decode, lab.proxy.endpoint)
    wait_for(lambda: 1 in lab.prefill.requested)
    nonce = lab.decode.nonces[1]
    socket = raw_peer(lab)
    hello = Hello(WIRE_VERSION, 1, lab.prefill.thread.fingerprint, ["identity"])
    ask = Request(1, nonce, 0, 16, 0, 4, 1, 0, 0, "", [])
    for message in (hello, Done(1, nonce), Ack(1, nonce, [0, 1]), Nack(1, nonce, [0]), ask):
        socket.send_multipart([b"C", pack_message(message)])
    wait_for(lambda: len(lab.prefill.thread.peers) == 2)
    time.sleep(0.3)
    lab.prefill.send(1, lab.sent, NUM_TOKENS)
    lab.finish(out, result)
    assert result.result == "success"
    assert_equal(lab.prefill, lab.sent, lab.decode, got, NUM_TOKENS)
    answers = []
    while socket.poll(200):
        answers.append(socket.recv_multipart())
    assert all(frames[0] == b"C" for frames in answers), "a stranger got a block"
    socket.close()


def test_any_bytes_leave_both_sides_running(lab: Lab) -> None:
    """Random, mutated, replayed and reordered frames to both sides, then a normal transfer."""
    generator = random.Random(7)
    out, result, _ = lab.begin(1, lab.decode, lab.proxy.endpoint)
    wait_for(lambda: 1 in lab.prefill.requested)
    socket = raw_peer(lab)
    for _ in range(300):
        frames = [
            generator.randbytes(generator.randrange(60)) for _ in range(generator.randrange(5))
        ]
        if generator.random() < 0.5:
            frames = [b"C", msgpack.packb({"type": generator.choice(["hello", "ack", "done"])})]
        socket.send_multipart(frames or [b""])
    # The decode rank gets the same from a false prefill rank.
    false = zmq.Context.instance().socket(zmq.ROUTER)
    false.linger = 0
    port = false.bind_to_random_port("tcp://127.0.0.1")
    lab.decode.announce(9, [f"tcp://127.0.0.1:{port}"])
    identity, *_ = false.recv_multipart()
    untouched = [layer.pages.clone() for layer in lab.decode.pool.layers]
    fields = dict.fromkeys(BlockHeader._fields, 1) | {"kind": 0}
    fields |= {"fingerprint": lab.decode.thread.digest, "nonce": lab.decode.nonces[1]}
    for number in range(300):
        header = bytearray(pack_header(BlockHeader(**(fields | {"seq": number}))))
        if generator.random() < 0.5:
            header[generator.randrange(HEADER_BYTES)] ^= 1
        payload = generator.randbytes(generator.randrange(100))
        false.send_multipart([identity, b"B", bytes(header), payload])
        false.send_multipart([identity, b"B", bytes(header), payload, payload])
        false.send_multipart([identity, *[generator.randbytes(9)] * generator.randrange(5), b""])
    wait_for(lambda: lab.decode.thread.metrics.refused._value.get() > 100)
    for layer, old in zip(lab.decode.pool.layers, untouched, strict=True):
        assert torch.equal(layer.pages, old)
    lab.prefill.send(1, lab.sent, NUM_TOKENS)
    lab.finish(out, result)
    assert result.result == "success"
    assert parse_header(pack_header(BlockHeader(**fields))).room == 1
    socket.close()
    false.close()
