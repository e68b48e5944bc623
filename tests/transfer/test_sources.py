"""A decode rank gets each of its KV heads from exactly one prefill rank, or says which it lacks."""

from __future__ import annotations

import pytest

from sgl_kvq.errors import TransferError
from sgl_kvq.memory_pool.page_io.span import HeadRange
from sgl_kvq.transfer.blocks import heads_of_rank
from sgl_kvq.transfer.decode.sources import Source, check_sources
from sgl_kvq.transfer.options import TransferConfig
from tests.support.proxy import Proxy
from tests.support.transfer_pair import DecodeSide, PrefillSide, stopped, take_pages, wait_for

CONFIG = TransferConfig(deadline_s=6.0, block_bytes=16384, window_bytes=65536)


def sources(*ranges: tuple[int, int]) -> list[Source]:
    return [Source(f"tcp://h:{i}", i, HeadRange(*heads)) for i, heads in enumerate(ranges)]


@pytest.mark.parametrize("num_heads", [1, 2, 4, 8])
def test_what_sglang_gives_ranks_is_accepted(num_heads: int) -> None:
    """For all tensor-parallel sizes, more ranks than heads included."""
    for prefill_tp in (1, 2, 4, 8, 16):
        for decode_tp in (1, 2, 4, 8, 16):
            for rank in range(decode_tp):
                wanted = heads_of_rank(num_heads, decode_tp, rank)
                if prefill_tp >= decode_tp:
                    ratio = prefill_tp // decode_tp
                    ranks = list(range(rank * ratio, (rank + 1) * ratio))
                else:
                    ranks = [rank * prefill_tp // decode_tp]
                held = [heads_of_rank(num_heads, prefill_tp, r).intersect(wanted) for r in ranks]
                check_sources(
                    [Source(f"{r}", r, h) for r, h in zip(ranks, held, strict=True)], wanted
                )


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ([(0, 2)], "no rank holds heads 2, 3"),
        ([], "no rank holds heads 0, 1, 2, 3"),
        ([(0, 2), (3, 4)], "no rank holds head 2"),
        ([(0, 2), (0, 2)], "no rank holds heads 2, 3 and several hold heads 0, 1"),
        ([(0, 3), (2, 4)], "several hold head 2"),
        ([(0, 4), (1, 2)], "several hold head 1"),
        ([(0, 1), (1, 2), (2, 3), (3, 4), (3, 4)], "several hold head 3"),
    ],
)
def test_what_is_missing_or_doubled_is_named(ranges: list[tuple[int, int]], words: str) -> None:
    with pytest.raises(TransferError, match=words) as refusal:
        check_sources(sources(*ranges), HeadRange(0, 4))
    assert "\n" not in str(refusal.value)


def test_two_addresses_of_one_process_are_one_rank() -> None:
    with pytest.raises(TransferError, match="tcp://a:1 and tcp://b:1 are the same process"):
        check_sources(
            [Source("tcp://a:1", 5, HeadRange(0, 1)), Source("tcp://b:1", 5, HeadRange(1, 2))],
            HeadRange(0, 2),
        )


def test_a_request_without_any_prefill_rank_fails_at_once() -> None:
    decode = DecodeSide(CONFIG)
    with stopped(decode):
        result = decode.announce(1, [])
        wait_for(lambda: bool(result.result), 1.0)
        assert "expected at least one prefill rank" in result.reason


@pytest.mark.parametrize("fault", ["merged", "two addresses", "rank 0 twice", "another rank"])
def test_a_transfer_of_some_heads_is_no_success(fault: str) -> None:
    """Two prefill ranks of two heads each; the decode rank is told of rank 0 only, or wrongly."""
    prefill = [PrefillSide(CONFIG, (2, rank), seed=rank + 1) for rank in range(2)]
    twin = PrefillSide(CONFIG, (2, 0), seed=3)
    decode = DecodeSide(CONFIG)
    proxy = Proxy(prefill[0].thread.port)
    told = {
        "merged": [prefill[0]],
        "two addresses": [prefill[0], proxy],
        "rank 0 twice": [prefill[0], twin],
        "another rank": [twin],
    }[fault]
    with stopped(*prefill, twin, decode):
        senders = {*told} & {*prefill, twin}
        result = decode.announce(1, [side.endpoint for side in told])
        for side in senders:
            side.open(1)
        decode.start(1, take_pages(decode.pool, 300, 20))
        for side in senders:
            side.send(1, take_pages(side.pool, 300, 1), 300)
        wait_for(lambda: bool(result.result), 3.0)
        assert result.result == "failed"
        assert "check what the bootstrap server was told" in result.reason
        proxy.close()
