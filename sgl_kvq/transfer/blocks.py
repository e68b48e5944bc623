"""Blocks of a transfer: which pages and layers go into one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sgl_kvq.memory_pool.page_io.span import HeadRange, PageIds, PageSpan, SpanKind
from sgl_kvq.transfer.protocol.header import BlockKind


def heads_of_rank(num_kv_heads: int, tp_size: int, tp_rank: int) -> HeadRange:
    """KV heads that SGLang gives a rank; ranks share a head when there are more of them."""
    if tp_size >= num_kv_heads:
        head = tp_rank * num_kv_heads // tp_size
        return HeadRange(head, head + 1)
    count = num_kv_heads // tp_size
    return HeadRange(tp_rank * count, (tp_rank + 1) * count)


class Block(NamedTuple):
    """A block to send: a span of the pool that is read later, or metadata.

    Args:
        kind: What it holds.
        first_page: Position of its first page in the sequence.
        span: What is read from the pool; None for METADATA.
        metadata: The payload of METADATA.
    """

    kind: BlockKind
    first_page: int = 0
    span: PageSpan | None = None
    metadata: bytes = b""


def metadata_block(data: bytes) -> Block:
    """The block that ends a transfer: SGLang's record of the first token."""
    return Block(BlockKind.METADATA, metadata=data)


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
        ready: See `PageSpan`.
    """
    if not len(pages):
        return
    for size, run in itertools.groupby(range(len(page_bytes)), page_bytes.__getitem__):
        alike = list(run)
        num_groups = -(-len(pages) // max(1, block_bytes // size))
        bounds = [group * len(pages) // num_groups for group in range(num_groups + 1)]
        for start, end in itertools.pairwise(bounds):
            for layers in _cut_layers(len(alike), (end - start) * size, block_bytes):
                span = PageSpan(
                    SpanKind.PAGES,
                    pages[start:end],
                    alike[layers.start],
                    len(layers),
                    ready=ready,
                )
                yield Block(BlockKind.PAGES, first_page + start, span)


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
        ready: See `PageSpan`.
    """
    for layers in _cut_layers(num_layers, num_rows * row_bytes, block_bytes):
        span = PageSpan(SpanKind(kind), page, layers.start, len(layers), num_rows, ready)
        yield Block(kind, span=span)


def _cut_layers(num_layers: int, layer_bytes: int, block_bytes: int) -> Iterator[range]:
    step = max(1, block_bytes // layer_bytes)
    for first in range(0, num_layers, step):
        yield range(first, min(first + step, num_layers))
