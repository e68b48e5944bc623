"""What is read from a pool or written to it at once: pages or 16-bit rows, of some layers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
PageIds = npt.NDArray[np.int64]
Buffer = bytes | bytearray | memoryview


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


class SpanKind(IntEnum):
    """Which part of a pool a span lies in.

    PAGES: closed pages, uint8 [layers, pages, heads * head bytes].
    OPEN_ROWS: 16-bit rows of a page that is still written, [layers, 2, rows, heads, head_dim].
    SINK_ROWS: 16-bit rows of the first tokens of a first page, [layers, 2, rows, heads, head_dim].
    """

    PAGES = 0
    OPEN_ROWS = 1
    SINK_ROWS = 2


class PageSpan(NamedTuple):
    """Pages, or the 16-bit rows of one page, in consecutive layers.

    Args:
        kind: The part of the pool.
        pages: int64 [n] page ids; [1] for OPEN_ROWS and SINK_ROWS, the page that holds the slot.
        first_layer: First layer of this rank's pool.
        num_layers: Layers.
        num_rows: Rows of OPEN_ROWS and SINK_ROWS.
        ready: CUDA event after which the pool holds the bytes; None when it does already.
    """

    kind: SpanKind
    pages: PageIds
    first_layer: int
    num_layers: int
    num_rows: int = 0
    ready: Any = None

    @property
    def num_pages(self) -> int:
        """Closed pages in the span."""
        return len(self.pages) if self.kind is SpanKind.PAGES else 0

    @property
    def layers(self) -> slice:
        """The layers as a slice."""
        return slice(self.first_layer, self.first_layer + self.num_layers)


def contiguous_slice(pages: PageIds) -> slice | None:
    """Page ids that follow each other, as a slice of the pool; None if they do not."""
    first, count = int(pages[0]), len(pages)
    if count > 1 and (int(pages[-1]) - first != count - 1 or (np.diff(pages) != 1).any()):
        return None
    return slice(first, first + count)
