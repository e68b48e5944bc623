"""Work out which pages an extend batch writes and reads (pure arithmetic)."""

from __future__ import annotations

import numpy as np

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.kernels.extend.passes import (
    ExtendPlan,
    ExtendRequest,
    FillPlan,
    IntArray,
    TouchedPlan,
)


def plan_extend(
    prefix_lens: list[int], extend_lens: list[int], quantized_prefill: bool
) -> ExtendPlan:
    """Plan a batch.

    Args:
        prefix_lens: Cached tokens of each request.
        extend_lens: Fresh tokens of each request, at least 1.
        quantized_prefill: See `ExtendRequest.quantized`.
    """
    requests = []
    q_start = touched_start = 0
    for index, (prefix_len, extend_len) in enumerate(zip(prefix_lens, extend_lens, strict=True)):
        seq_len = prefix_len + extend_len
        request = ExtendRequest(
            index, prefix_len, seq_len, q_start, touched_start, quantized_prefill
        )
        requests.append(request)
        q_start += extend_len
        touched_start += request.num_touched
    resumed = [request for request in requests if request.prefix_len % PAGE_SIZE]
    return ExtendPlan(
        requests=requests,
        touched=_touched(requests, {request.index: n for n, request in enumerate(resumed)}),
        resumed=np.array([request.touched_start for request in resumed], np.int32),
    )


def _touched(requests: list[ExtendRequest], resumed: dict[int, int]) -> TouchedPlan:
    parts = []
    for request in requests:
        page = np.arange(request.first_touched, request.last_page + 1, dtype=np.int32)
        first = np.maximum(request.prefix_len - page * PAGE_SIZE, 0)
        start = request.q_start + page * PAGE_SIZE + first - request.prefix_len
        end = np.minimum(request.seq_len - page * PAGE_SIZE, PAGE_SIZE)
        prior = np.full_like(page, resumed.get(request.index, 0))
        parts.append((np.full_like(page, request.index), page, prior, first, end, start))
    columns = [np.concatenate(column).astype(np.int32) for column in zip(*parts, strict=True)]
    return TouchedPlan(*columns)


def closed_fill(request: ExtendRequest, begin: int, end: int, target: int) -> FillPlan:
    """Codes of the closed pages from `begin` to `end`, in one piece from token `target` on."""
    return page_fill(request, np.arange(begin, end, dtype=np.int32), target)


def page_fill(request: ExtendRequest, page: IntArray, target: int) -> FillPlan:
    """Codes of some closed pages, in one piece from token `target` on."""
    places = target + np.arange(len(page), dtype=np.int32) * PAGE_SIZE
    return FillPlan(np.full_like(page, request.index), page, np.full_like(page, -1), places)


def touched_fill(request: ExtendRequest, target: int) -> FillPlan:
    """16-bit rows of the pages that the request touches, in one piece from token `target` on."""
    count = np.arange(request.num_touched, dtype=np.int32)
    return FillPlan(
        np.full_like(count, request.index),
        request.first_touched + count,
        request.touched_start + count,
        target + count * PAGE_SIZE,
    )
