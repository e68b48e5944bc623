"""Blocks of a transfer: which heads, pages and layers go into one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sgl_kvq.transfer.protocol.header import BlockKind

PageIds = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HeadRange:
    """KV heads [first, end), counted over all ranks."""

    first: int
    end: int

    @property
    def count(self) -> int:
        """Number of heads."""
        return self.end - self.first

    def intersect(self, other: HeadRange) -> HeadRange:
        """Heads in both; count 0 if there are none."""
        first = max(self.first, other.first)
        return HeadRange(first, max(first, min(self.end, other.end)))

    def within(self, outer: HeadRange) -> slice:
        """These heads as a slice of those of a rank that holds `outer`."""
        return slice(self.first - outer.first, self.end - outer.first)


def heads_of_rank(num_kv_heads: int, tp_size: int, tp_rank: int) -> HeadRange:
    """KV heads that SGLang gives a rank; ranks share a head when there are more of them."""
    if tp_size >= num_kv_heads:
        head = tp_rank * num_kv_heads // tp_size
        return HeadRange(head, head + 1)
    count = num_kv_heads // tp_size
    return HeadRange(tp_rank * count, (tp_rank + 1) * count)


@dataclass(frozen=True, eq=False)
class Block:
    """A block to send, before it is read from the pool.

    Args:
        kind: What it holds.
        first_page: Position of its first page in the sequence.
        pages: int64 [n], where its pages lie in the pool. Of OPEN_ROWS and SINK_ROWS: the page
            that holds the slot.
        first_layer: First layer.
        num_layers: Layers.
        num_rows: Rows of OPEN_ROWS and SINK_ROWS.
        data: The payload itself, of METADATA.
        ready: CUDA event after which the pool holds the bytes; None when it does already.
    """

    kind: BlockKind
    first_page: int = 0
    pages: PageIds = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    first_layer: int = 0
    num_layers: int = 0
    num_rows: int = 0
    data: bytes = b""
    ready: Any = None

    @property
    def num_pages(self) -> int:
        """Closed pages in it."""
        return len(self.pages) if self.kind is BlockKind.PAGES else 0


def cut_pages(
    first_page: int,
    pages: PageIds,
    page_bytes: Sequence[int],
    block_bytes: int,
    ready: Any = None,
) -> Iterator[Block]:
    """Cut closed pages into blocks of at most `block_bytes`, or of one page in one layer.

    A block is filled with pages of one layer first, and with layers when there are no more pages:
    what lies in one layer is copied by one call. Its pages are equally large in all its layers.

    Args:
        first_page: Position of the first page in the sequence.
        pages: int64 [n], pages in the pool.
        page_bytes: Bytes of a page in each layer of the pool, of the heads that are sent.
        block_bytes: Size to fill up to.
        ready: See `Block`.
    """
    if not len(pages):
        return
    for size, run in itertools.groupby(range(len(page_bytes)), page_bytes.__getitem__):
        alike = list(run)
        num_groups = -(-len(pages) // max(1, block_bytes // size))
        bounds = [group * len(pages) // num_groups for group in range(num_groups + 1)]
        for start, end in itertools.pairwise(bounds):
            for layers in _cut_layers(len(alike), (end - start) * size, block_bytes):
                yield Block(
                    BlockKind.PAGES,
                    first_page + start,
                    pages[start:end],
                    alike[layers.start],
                    len(layers),
                    ready=ready,
                )


def cut_rows(
    kind: BlockKind,
    page: PageIds,
    num_rows: int,
    num_layers: int,
    row_bytes: int,
    block_bytes: int,
    ready: Any = None,
) -> Iterator[Block]:
    """Cut the 16-bit rows of an open page, or of sink tokens, by layers.

    Args:
        kind: OPEN_ROWS or SINK_ROWS.
        page: int64 [1], the page that holds the slot.
        num_rows: Tokens.
        num_layers: Layers of the pool.
        row_bytes: K and V of a token in one layer, of the heads that are sent.
        block_bytes: Size to fill up to.
        ready: See `Block`.
    """
    for layers in _cut_layers(num_layers, num_rows * row_bytes, block_bytes):
        yield Block(
            kind,
            pages=page,
            first_layer=layers.start,
            num_layers=len(layers),
            num_rows=num_rows,
            ready=ready,
        )


def _cut_layers(num_layers: int, layer_bytes: int, block_bytes: int) -> Iterator[range]:
    step = max(1, block_bytes // layer_bytes)
    for first in range(0, num_layers, step):
        yield range(first, min(first + step, num_layers))


def run_of(pages: PageIds) -> slice | None:
    """Pages that follow each other in the pool, as a slice of it; None if they do not."""
    first, count = int(pages[0]), len(pages)
    if count > 1 and (int(pages[-1]) - first != count - 1 or (np.diff(pages) != 1).any()):
        return None
    return slice(first, first + count)
