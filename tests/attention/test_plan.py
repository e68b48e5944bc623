"""The plan of an extend step: both devices read from it, and they must read the same."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sgl_kvq.attention.plan.extend import plan_extend
from sgl_kvq.attention.plan.passes import plan_passes, scratch_pages_of
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.kernels.common.upload import upload_columns
from sgl_kvq.kernels.extend.passes import AttentionPass, ExtendPlan, ExtendRequest
from sgl_kvq.kernels.extend.reference import extend_mask

LENGTHS = st.one_of(st.integers(0, 260), st.sampled_from([0, 63, 64, 127, 128, 191]))
BATCHES = st.lists(st.tuples(LENGTHS, LENGTHS.map(lambda n: n + 1)), min_size=1, max_size=3)

Source = tuple[bool, int]
"""Where a key comes from: whether from codes, its position."""


@settings(max_examples=50, deadline=None)
@given(BATCHES, st.booleans())
def test_every_fresh_row_has_one_place(batch: list[tuple[int, int]], quantized: bool) -> None:
    prefix_lens, extend_lens = map(list, zip(*batch, strict=True))
    plan = plan_extend(prefix_lens, extend_lens, quantized)
    touched = plan.touched
    places = []
    for i in range(len(touched.page)):
        prefix = prefix_lens[touched.request[i]]
        q_start = plan.requests[touched.request[i]].q_start
        for row in range(touched.first[i], touched.end[i]):
            token = touched.start[i] + row - touched.first[i]
            assert touched.page[i] * PAGE_SIZE + row == prefix + token - q_start
            places.append(token)
    assert places == list(range(sum(extend_lens)))
    resumed = [request for request in plan.requests if request.prefix_len % PAGE_SIZE]
    assert plan.resumed.tolist() == [request.touched_start for request in resumed]
    for n, index in enumerate(plan.resumed):
        assert touched.first[index] > 0
        assert touched.resumed[index] == n
    assert int((touched.first > 0).sum()) == len(resumed)


@settings(max_examples=50, deadline=None)
@given(BATCHES, st.booleans(), st.sampled_from([1, 3, 8, 100]))
@example([(0, 64), (64, 64), (100, 28), (128, 1)], True, 3)
@example([(0, 1), (320, 320)], False, 4)
def test_passes_read_what_the_mask_of_the_specification_says(
    batch: list[tuple[int, int]], quantized: bool, max_pages: int
) -> None:
    """GPU: passes over a scratch buffer, merged. CPU: one mask a request. The same keys, once."""
    prefix_lens, extend_lens = map(list, zip(*batch, strict=True))
    plan = plan_extend(prefix_lens, extend_lens, quantized)
    passes = plan_passes(plan.requests, max_pages)
    found: list[list[Source]] = [[] for _ in range(sum(extend_lens))]
    merged = np.zeros(len(found), bool)
    for one_pass in passes:
        rows = slice(one_pass.q_begin, one_pass.q_end)
        assert (merged[rows] == one_pass.merges).all()
        merged[rows] = True
        assert len(one_pass.fills.page) <= scratch_pages_of(passes)
        for row, sources in enumerate(_seen(plan, one_pass), one_pass.q_begin):
            found[row] += sources
    assert merged.all()
    for request in plan.requests:
        for row, expected in enumerate(_masked(request), request.q_start):
            assert sorted(found[row]) == sorted(expected)


def test_packed_columns_come_back_by_name() -> None:
    columns = {
        "a": np.arange(3, dtype=np.int32),
        "none": np.empty(0, np.int32),
        "b": np.array([9], np.int32),
    }
    packed = upload_columns(columns, torch.device("cpu"))
    assert list(packed) == list(columns)
    for name, column in columns.items():
        assert packed[name].dtype == torch.int32
        assert packed[name].tolist() == column.tolist()


def _seen(plan: ExtendPlan, one_pass: AttentionPass) -> list[list[Source]]:
    """What each row of a pass sees, read from the fills alone."""
    fills = one_pass.fills
    scratch: dict[int, tuple[int, Source]] = {}  # by token of the buffer: request, source
    for request, page, touched, target in zip(
        fills.request, fills.page, fills.touched, fills.target, strict=True
    ):
        if touched >= 0:
            assert plan.touched.request[touched] == request
            assert plan.touched.page[touched] == page
        for row in range(PAGE_SIZE):
            place = int(target) + row
            position = int(page) * PAGE_SIZE + row
            if touched >= 0 and row >= plan.touched.end[touched]:
                continue  # not written: the next fill may begin here
            scratch[place] = (int(request), (touched < 0, position))
    by_row = []
    for n in range(len(one_pass.qo_indptr) - 1):
        begin, end = one_pass.kv_indptr[n : n + 2].tolist()
        if one_pass.kv_indices is None:
            places = list(range(begin, end))
        else:
            assert one_pass.kv_last_page_len is not None
            pages = one_pass.kv_indices[begin:end].tolist()
            places = [page * PAGE_SIZE + row for page in pages for row in range(PAGE_SIZE)]
            if pages:
                places = places[: (len(pages) - 1) * PAGE_SIZE + one_pass.kv_last_page_len[n]]
        rows = range(*(one_pass.q_begin + one_pass.qo_indptr[n : n + 2]).tolist())
        for i, row in enumerate(rows):
            last = len(places) - (len(rows) - 1 - i) if one_pass.causal else len(places)
            keys = [scratch[place] for place in places[:last]]
            owner = next(r.index for r in plan.requests if r.q_start <= row < r.q_end)
            assert all(request == owner for request, _ in keys)
            by_row.append([source for _, source in keys])
    return by_row


def _masked(request: ExtendRequest) -> list[list[Source]]:
    """What each fresh row of a request sees by `extend_mask`."""
    closed = [(True, position) for position in range(request.num_closed * PAGE_SIZE)]
    first = request.first_touched * PAGE_SIZE
    sources = closed + [(False, position) for position in range(first, request.seq_len)]
    mask = extend_mask(request, torch.device("cpu")).numpy()
    return [[sources[key] for key in np.flatnonzero(row)] for row in mask]
