"""Spans are read and written where they lie; rows only through the slot that the page holds now."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from sgl_kvq.errors import SlotNotHeldError, SpanError
from sgl_kvq.memory_pool.page_io.base import PoolAccess
from sgl_kvq.memory_pool.page_io.factory import open_pool
from sgl_kvq.memory_pool.page_io.span import HeadRange, PageSpan, SpanKind
from tests.support.sink_rows import give_sink_rows, take_back
from tests.support.transfer_pair import NUM_HEADS, NUM_LAYERS, SINK_TOKENS, make_pool

HEADS = HeadRange(0, NUM_HEADS)


def read(access: PoolAccess, span: PageSpan, heads: HeadRange = HEADS) -> np.ndarray:
    out = access.new_buffer(access.span_bytes(span, heads))
    access.read(span, heads, out)
    return out


@pytest.mark.parametrize("pages", [[5], [5, 6, 7], [9, 2, 4]])
@pytest.mark.parametrize("heads", [HEADS, HeadRange(1, 3)])
def test_pages_go_from_one_pool_to_another(pages: list[int], heads: HeadRange) -> None:
    source, target = make_pool(seed=1), make_pool(seed=2)
    ids = np.array(pages)
    before = [layer.pages.clone() for layer in target.layers]
    for span in (PageSpan(SpanKind.PAGES, ids, 0, 2), PageSpan(SpanKind.PAGES, ids, 2, 1)):
        data = read(open_pool(source, HEADS), span, heads)
        open_pool(target, HEADS).write(span, heads, data.data)
    width = source.layout.head_bytes
    columns = torch.zeros(source.layout.page_bytes, dtype=torch.bool)
    columns[heads.first * width : heads.end * width] = True
    for mine, other, old in zip(source.layers, target.layers, before, strict=True):
        expected = old.clone()
        expected[ids[:, None], columns] = mine.pages[ids[:, None], columns]
        assert torch.equal(other.pages, expected)


def test_pages_in_a_row_need_no_copy() -> None:
    access = open_pool(make_pool(seed=1), HEADS)
    span = PageSpan(SpanKind.PAGES, np.array([5, 6, 7]), 1, 1)
    view = access.view(span, HEADS)
    assert view is not None
    assert view.ctypes.data == access.pool.layers[1].pages[5].data_ptr()
    assert (view == read(access, span)).all()
    assert access.view(span, HeadRange(0, 1)) is None
    assert access.view(span._replace(pages=np.array([5, 7])), HEADS) is None
    assert access.view(span._replace(num_layers=2), HEADS) is None


@pytest.mark.parametrize("kind", [SpanKind.OPEN_ROWS, SpanKind.SINK_ROWS])
def test_rows_of_a_page_that_gave_its_slot_up_cannot_be_reached(kind: SpanKind) -> None:
    """The next owner's rows lie in that slot: they are neither read nor written over."""
    pool = make_pool(seed=1)
    access = open_pool(pool, HEADS)
    num_rows = 7 if kind is SpanKind.OPEN_ROWS else SINK_TOKENS
    old = PageSpan(kind, np.array([3]), 0, NUM_LAYERS, num_rows)
    new = old._replace(pages=np.array([8]))
    first, second = torch.tensor([3]), torch.tensor([8])
    if kind is SpanKind.OPEN_ROWS:
        pool.open_slots.acquire(first)
        mine = read(access, old)
        pool.open_slots.release(first)
        pool.open_slots.acquire(second)
        view, held = pool.open_slots.step_view(), pool.open_slots.held_slot(second)
        assert view[3] == held  # the stale entry
    else:
        row = give_sink_rows(pool, first)
        mine = read(access, old)
        take_back(pool, first)
        assert give_sink_rows(pool, second) == row
    theirs = read(access, new)
    assert (mine == theirs).all()
    for attempt in (
        lambda: read(access, old),
        lambda: access.write(old, HEADS, bytes(len(mine))),
    ):
        with pytest.raises(SlotNotHeldError, match="page 3 holds no slot"):
            attempt()
    assert (read(access, new) == theirs).all()
    assert access.held_rows(np.array([8]), []) == {kind}
    assert access.held_rows(np.array([3]), []) == frozenset()


def test_bytes_of_another_size_are_refused() -> None:
    pool = make_pool(seed=1)
    access = open_pool(pool, HEADS)
    pool.open_slots.acquire(torch.tensor([3]))
    for span in (
        PageSpan(SpanKind.PAGES, np.array([5, 6]), 0, 1),
        PageSpan(SpanKind.OPEN_ROWS, np.array([3]), 0, 2, 9),
    ):
        nbytes = access.span_bytes(span, HEADS)
        for wrong in (nbytes - 1, nbytes + 1, 0):
            with pytest.raises(SpanError, match=f"expected {nbytes} bytes, got {wrong}"):
                access.write(span, HEADS, bytes(wrong))


def test_page_io_knows_nothing_of_the_wire() -> None:
    """And its interface needs no PyTorch."""
    program = """
import sys
import sgl_kvq.memory_pool.page_io.base
print(any(name in sys.modules for name in ("torch", "zmq")))
import sgl_kvq.memory_pool.page_io.factory
print([name for name in sys.modules if name.startswith("sgl_kvq.transfer")])
"""
    command = [sys.executable, "-c", program]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert answer.stdout.splitlines() == ["False", "[]"]
