"""How a transfer is cut into blocks, and the buffers they are read into."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_kvq.errors import SpanError
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.memory_pool.page_io.factory import open_pool
from sgl_kvq.memory_pool.page_io.span import HeadRange, PageSpan, contiguous_slice
from sgl_kvq.transfer.blocks import Block, cut_pages, cut_rows, heads_of_rank
from sgl_kvq.transfer.options import TransferConfig
from sgl_kvq.transfer.prefill.buffers import SendBuffers
from sgl_kvq.transfer.protocol.header import MAX_BLOCK_BYTES, BlockKind
from tests.support.sink_rows import take_back
from tests.support.transfer_pair import (
    NUM_HEADS,
    NUM_LAYERS,
    DecodeSide,
    PrefillSide,
    make_pool,
    ship,
    stopped,
    wait_for,
)

CONFIG = TransferConfig(deadline_s=4.0, block_bytes=16384, window_bytes=65536)


def span_of(block: Block) -> PageSpan:
    assert block.span is not None
    return block.span


def test_a_block_of_layers_with_pages_of_two_sizes_is_refused() -> None:
    pool = make_pool("chosen")
    access = open_pool(pool, HeadRange(0, NUM_HEADS))
    sizes = [layout.page_bytes for layout in pool.plan.layouts]
    spans = [span_of(block) for block in cut_pages(0, np.array([5]), sizes, 1 << 20)]
    assert [(span.first_layer, span.num_layers) for span in spans] == [(0, 2), (2, 1)]
    everything = spans[0]._replace(num_layers=NUM_LAYERS)
    with pytest.raises(SpanError, match=r"layers 0 to 3: expected pages of one size"):
        access.span_bytes(everything, access.heads)


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
        span = span_of(block)
        (in_layer,) = set(page_bytes[span.layers])
        size = span.num_layers * span.num_pages * in_layer
        assert size <= block_bytes or (span.num_layers, span.num_pages) == (1, 1)
        positions = range(block.first_page - 3, block.first_page - 3 + span.num_pages)
        assert [pages[i] for i in positions] == span.pages.tolist()
        layers = range(span.first_layer, span.first_layer + span.num_layers)
        seen += [(layer, i) for layer in layers for i in positions]
        run = contiguous_slice(span.pages)
        assert (run is not None) == (np.diff(span.pages) == 1).all()
        assert run is None or (np.arange(run.start, run.stop) == span.pages).all()
    assert sorted(seen) == [(layer, i) for layer in range(num_layers) for i in range(len(pages))]


def test_an_open_page_of_a_large_model_fits_the_wire() -> None:
    """80 layers of 8 heads: 20 MB of rows, in blocks within the limit."""
    page = np.array([1])
    row_bytes = 2 * 8 * 128 * 2
    blocks = cut_rows(BlockKind.OPEN_ROWS, page, 63, 80, row_bytes, 2**20)
    spans = [span_of(block) for block in blocks]
    assert sum(span.num_layers for span in spans) == 80
    assert max(span.num_layers * 63 * row_bytes for span in spans) <= MAX_BLOCK_BYTES


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
                take_back(pool, torch.arange(pool.plan.num_pages))
        wait_for(lambda: not prefill.thread.rooms)
        assert sum(map(len, prefill.thread._buffers._free.values())) == len(made)
        assert len(made) <= CONFIG.window_bytes // CONFIG.block_bytes + 8


def test_heads_of_ranks() -> None:
    assert [heads_of_rank(8, 2, rank) for rank in range(2)] == [HeadRange(0, 4), HeadRange(4, 8)]
    shared = [HeadRange(0, 1), HeadRange(0, 1), HeadRange(1, 2), HeadRange(1, 2)]
    assert [heads_of_rank(2, 4, rank) for rank in range(4)] == shared
    assert PAGE_SIZE == 64
