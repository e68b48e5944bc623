"""What a program needs to know of its segment: the units of one (request, KV head)."""

from __future__ import annotations

from typing import Any, NamedTuple


class Segment(NamedTuple):
    """Units `first` to `end - 1` of one (request, KV head); see `kernel.py` for units.

    Args:
        request: Row of the batch.
        head: KV head.
        first: First unit, counted from the first page of the request.
        end: Unit behind the last one.
        num_closed: Closed pages of the request; later units are 16-bit rows.
        indices_ptr: Page numbers of the request.
        last_page_len: Rows in the open page.
        open_slot: Slot of the open page's rows.
        sink_page: Slot of the sink rows.
    """

    request: Any
    head: Any
    first: Any
    end: Any
    num_closed: Any
    indices_ptr: Any
    last_page_len: Any
    open_slot: Any
    sink_page: Any


class Storage(NamedTuple):
    """A layer's cache: pages of codes, and the 16-bit rows of open pages and sink tokens."""

    pages_ptr: Any
    open_rows_ptr: Any
    sink_rows_ptr: Any


class Queries(NamedTuple):
    """Queries of a segment's KV head: as 16-bit rows meet them, and in the basis of key codes."""

    rows_ptr: Any
    rows_stride: Any
    codes_ptr: Any
    codes_stride: Any


class FreshRow(NamedTuple):
    """The newest K and V row of a segment's request and head, not yet in its open slot."""

    k_ptr: Any
    v_ptr: Any
