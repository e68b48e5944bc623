"""Blocks that worker threads copy and hash: the same bytes, nothing written late, nothing left."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from sgl_kvq.errors import ChecksumError, WireError
from sgl_kvq.memory_pool.page_io.factory import open_pool
from sgl_kvq.memory_pool.page_io.span import HeadRange
from sgl_kvq.transfer.decode.assembly import IncomingPart, IncomingTransfer
from sgl_kvq.transfer.decode.sources import Source
from sgl_kvq.transfer.options import TransferConfig
from sgl_kvq.transfer.protocol.header import BlockHeader, BlockKind, payload_checksum
from sgl_kvq.transfer.protocol.prompt import Prompt
from sgl_kvq.transfer.runtime import workers
from sgl_kvq.transfer.runtime.request_state import RequestState
from sgl_kvq.transfer.runtime.workers import MIN_POOLED_BYTES, Job, WorkerPool
from tests.support.sink_rows import take_back
from tests.support.transfer_pair import (
    NUM_HEADS,
    DecodeSide,
    PrefillSide,
    assert_equal,
    make_pool,
    ship,
    stopped,
    transfer_threads,
)

CONFIG = TransferConfig(deadline_s=5.0, block_bytes=16384, window_bytes=131072, workers=2)


class Recorded(Job):
    """Notes the thread it ran in, after a gate has opened."""

    def __init__(self, gate: threading.Event, nbytes: int = MIN_POOLED_BYTES) -> None:
        super().__init__(nbytes)
        self.gate, self.thread = gate, ""

    def work(self) -> None:
        self.thread = threading.current_thread().name
        assert self.gate.wait(5)
        if self.thread == "MainThread":
            raise ValueError("noted, not raised")


def test_large_jobs_go_to_workers_until_their_queue_is_full() -> None:
    before = threading.active_count()
    told: list[str] = []
    pool = WorkerPool(2, lambda: told.append(threading.current_thread().name))
    pool.start()
    gate, small, late = threading.Event(), threading.Event(), threading.Event()
    small.set()
    late.set()
    jobs = [Recorded(gate) for _ in range(2)]
    for job in jobs:
        pool.run([job])
    deadline = time.monotonic() + 5
    while not all(job.thread for job in jobs):  # both workers are busy
        assert time.monotonic() < deadline
        time.sleep(0.001)
    queued = [Recorded(gate, nbytes) for nbytes in (MIN_POOLED_BYTES, 1, 1, MIN_POOLED_BYTES)]
    for message in (queued[:2], queued[2:]):
        pool.run(message)
    assert not any(job.thread for job in queued)
    full, tiny = Recorded(late), Recorded(small, MIN_POOLED_BYTES - 1)
    for job in (full, tiny):
        pool.run([job])
    for job in (full, tiny):
        assert (job.thread, job.done) == ("MainThread", True)
        assert str(job.error) == "noted, not raised"
    gate.set()
    pool.stop()
    assert all(job.done and job.error is None for job in jobs + queued)
    assert told == ["kvq-transfer-worker"] * 4
    assert threading.active_count() == before


@pytest.mark.parametrize("format_name", ["hack2", "bf16", "chosen"])
def test_every_byte_arrives(format_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MIN_POOLED_BYTES", 1)
    ran: set[str] = set()
    work = Job.run

    def run(job: Job) -> None:
        ran.add(f"{type(job).__name__} in {threading.current_thread().name}")
        work(job)

    monkeypatch.setattr(Job, "run", run)
    prefill = PrefillSide(CONFIG, format_name=format_name)
    decode = DecodeSide(CONFIG, format_name=format_name)
    with stopped(prefill, decode):
        for room, num_tokens in enumerate((1, 64, 1000), 1):
            sent, got = ship(prefill, decode, room, num_tokens)
            assert_equal(prefill, sent, decode, got, num_tokens)
            for pool, pages in ((prefill.pool, sent), (decode.pool, got)):
                take_back(pool, pages)
        assert len(transfer_threads()) == 6
    assert not transfer_threads()
    assert {"OutgoingBlock in kvq-transfer-worker", "IncomingBlock in kvq-transfer-worker"} <= ran


def test_the_end_of_a_transfer_waits_for_what_is_being_written() -> None:
    reasons: list[str] = []
    state = RequestState(reasons.append)
    entered, gate, written = threading.Event(), threading.Event(), []

    def step() -> None:
        entered.set()
        assert gate.wait(5)
        written.append(len(reasons))

    writer = threading.Thread(target=state.write, args=(step,))
    writer.start()
    assert entered.wait(5)
    enders = [threading.Thread(target=state.fail, args=("ended",)) for _ in range(2)]
    enders.append(threading.Thread(target=state.forget))
    for ender in enders:
        ender.start()
    enders[0].join(0.2)
    assert all(ender.is_alive() for ender in enders)
    state.write(lambda: written.append(-1))  # no more
    gate.set()
    for thread in (writer, *enders):
        thread.join(5)
        assert not thread.is_alive()
    state.write(lambda: written.append(-1))
    assert written == [0]
    assert state.over
    assert reasons in ([], ["ended"])  # `forget` may have been first


def test_a_place_is_claimed_while_its_block_is_verified() -> None:
    access = open_pool(make_pool(num_pages=8), HeadRange(0, NUM_HEADS))
    metadata: list[bytes] = []
    state, prompt = RequestState(lambda reason: None), Prompt(99, 7, "")
    transfer = IncomingTransfer(1, 2, state, 0, np.array([3, 5]), [], prompt, metadata.append)
    part = IncomingPart(transfer, access, 11, 1, now=0.0)
    transfer.parts.append(part)
    part.set_source(Source("tcp://127.0.0.1:1", 1, HeadRange(0, NUM_HEADS)))
    payload = bytes(range(256)) * (access.num_layers * 2 * access.pool.layout.page_bytes // 256)

    def block(seq: int, **changes: Any) -> BlockHeader:
        fields = dict.fromkeys(BlockHeader._fields, 0) | {"kind": BlockKind.PAGES, "room": 1}
        fields |= {"nonce": 2, "fingerprint": 11, "seq": seq, "num_pages": 2}
        fields |= {"num_layers": access.num_layers, "num_heads": NUM_HEADS}
        fields |= {"raw_bytes": len(payload), "wire_bytes": len(payload)}
        return BlockHeader(**(fields | {"checksum": payload_checksum([payload])} | changes))

    bad = part.claim(block(0, checksum=1), payload)
    assert part.claim(block(0), payload) is None  # it is being written
    with pytest.raises(WireError, match="its place is taken"):
        part.claim(block(7), payload)
    # The number of blocks is said to be one while the place of all pages is only claimed.
    said = part.claim(
        block(0, kind=BlockKind.METADATA, raw_bytes=1, wire_bytes=1, checksum=0)._replace(
            seq=1, checksum=payload_checksum([b"m"])
        ),
        b"m",
    )
    said.run()
    assert part.record(said)
    part.num_blocks = 1
    assert not part.complete
    bad.run()
    with pytest.raises(ChecksumError):
        part.record(bad)
    part.num_blocks = 2
    assert not part.complete
    assert all((layer.pages.view(torch.uint8) == 0xEE).all() for layer in access.pool.layers)
    good = part.claim(block(0), payload)
    good.run()
    assert not part.complete
    assert part.record(good)
    assert part.complete
    assert part.claim(block(0), payload).done
