"""A slow link delivers every transfer, and hardly more than its bytes."""

from __future__ import annotations

import pytest

from sgl_kvq.transfer.decode.assembly import IncomingPart
from sgl_kvq.transfer.options import TransferConfig
from sgl_kvq.transfer.prefill import pace
from sgl_kvq.transfer.protocol.header import BlockKind
from tests.support.proxy import Proxy
from tests.support.transfer_pair import (
    DecodeSide,
    PrefillSide,
    assert_equal,
    stopped,
    take_pages,
    wait_for,
)

# Full blocks take three deadlines at the slowest of these rates.
CONFIG = TransferConfig(deadline_s=4.0, block_bytes=256 * 1024)
NUM_TOKENS = 400


@pytest.mark.parametrize(
    ("bytes_per_s", "requests"),
    [(20_000, 1), (100_000, 3), (400_000, 3), pytest.param(20_000, 3, marks=pytest.mark.long)],
)
def test_slow_clean_links_deliver(bytes_per_s: int, requests: int) -> None:
    prefill, decode = PrefillSide(CONFIG), DecodeSide(CONFIG)
    proxy = Proxy(prefill.thread.port, bytes_per_s)
    retries, failures = (
        prefill.thread.metrics.retries._value,
        decode.thread.metrics.checksum_failures._value,
    )
    before = retries.get(), failures.get()
    with stopped(prefill, decode):
        outcomes, pages = [], []
        for room in range(requests):
            pages.append(
                (
                    take_pages(prefill.pool, NUM_TOKENS, 1 + 16 * room),
                    take_pages(decode.pool, NUM_TOKENS, 1 + 16 * room),
                )
            )
            outcomes += [prefill.open(room), decode.announce(room, [proxy.endpoint])]
        decode.wait_ready(proxy.endpoint)
        for room, (_, got) in enumerate(pages):
            decode.start(room, got)
        wait_for(lambda: len(prefill.requested) == requests)
        for room, (sent, _) in enumerate(pages):
            prefill.send(room, sent, NUM_TOKENS)
        transfers = list(prefill.thread.rooms.values())
        wait_for(lambda: all(outcome.result for outcome in outcomes), 60.0)
        assert {outcome.result for outcome in outcomes} == {"success"}
        for sent, got in pages:
            assert_equal(prefill, sent, decode, got, NUM_TOKENS)
        payload = sum(part.wire_bytes for part in decoded_parts(decode, requests))
        sent_bytes = sum(transfer.bytes_sent for transfer in transfers)
        print(bytes_per_s, requests, payload, sent_bytes, proxy.passed_bytes, proxy.connections)
        assert sent_bytes <= 1.05 * payload
        assert (retries.get(), failures.get()) == before
        assert proxy.connections == 1
        proxy.close()


def decoded_parts(decode: DecodeSide, requests: int) -> list[IncomingPart]:
    connection = next(iter(decode.thread.connections.values()))
    return [connection.parts[room] for room in range(requests)]


def test_a_block_slower_than_a_third_of_the_deadline_arrives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A link that was fast when the block was cut; not every new connection cuts the block."""
    monkeypatch.setattr(pace, "START_BYTES", 2**25)
    config = TransferConfig(deadline_s=6.0, block_bytes=256 * 1024)
    prefill, decode = PrefillSide(config), DecodeSide(config)
    proxy = Proxy(prefill.thread.port, 70_000)
    with stopped(prefill, decode):
        sent, got = take_pages(prefill.pool, 384, 1), take_pages(decode.pool, 384, 1)
        out, result = prefill.open(1), decode.announce(1, [proxy.endpoint])
        decode.start(1, got)
        wait_for(lambda: 1 in prefill.requested)
        prefill.send(1, sent, 384)
        wait_for(lambda: prefill.thread.rooms[1].complete)
        largest = max(
            block.span.num_layers * len(block.span.pages) * prefill.pool.layout.page_bytes
            for block in prefill.thread.rooms[1].blocks
            if block.span and block.kind is BlockKind.PAGES
        )
        print("largest", largest)
        assert config.deadline_s / 3 < largest / 70_000 < config.deadline_s / 2
        wait_for(lambda: bool(out.result and result.result), 20.0)
        assert (out.result, result.result) == ("success", "success"), (out.reason, result.reason)
        assert_equal(prefill, sent, decode, got, 384)
        proxy.close()
