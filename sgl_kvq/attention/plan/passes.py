"""Cut an extend batch into attention passes over a bounded scratch buffer (pure arithmetic).

Keys of a batch are laid out in the scratch buffer page by page: closed pages from their codes,
pages this step writes to from their 16-bit rows. Requests share a pass while they fit; a prefix
larger than the buffer is attended to in several passes, whose results are merged by LSE.
"""

from __future__ import annotations

import numpy as np

from sgl_kvq.attention.plan.extend import closed_fill, page_fill, touched_fill
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.kernels.extend.passes import AttentionPass, ExtendRequest, FillPlan, IntArray


def plan_passes(requests: list[ExtendRequest], max_pages: int) -> list[AttentionPass]:
    """Requests share passes while they fit; of one that does not the prefix is cut.

    Exact mode attends to prefix and fresh rows in one causal pass. Quantized mode takes the prefix,
    which all fresh tokens see, in a pass of its own: contiguous keys are faster than pages.

    Args:
        requests: The batch.
        max_pages: Pages of the scratch buffer; a request whose causal part alone needs more gets
            a larger pass.

    Returns:
        Passes in the order to run them.
    """
    passes: list[AttentionPass] = []
    group: list[ExtendRequest] = []
    for request in requests:
        if group and not _fit([*group, request], max_pages):
            passes += _group_passes(group)
            group = []
        if _fit([request], max(max_pages, _final_pages(request))):
            group.append(request)
        else:
            passes += _long_passes(request, max_pages)
    return passes + _group_passes(group)


def scratch_pages_of(passes: list[AttentionPass]) -> int:
    """Pages of the scratch buffer that the largest pass fills."""
    return max(len(one_pass.fills.page) for one_pass in passes)


def _final_pages(request: ExtendRequest) -> int:
    """Pages that must share one pass with the queries' own pages: its mask cannot be cut."""
    return request.num_closed - request.first_touched + request.num_touched


def _rows_until(request: ExtendRequest, page: int) -> int:
    """Fresh tokens before a page."""
    end = min(max(page * PAGE_SIZE, request.prefix_len), request.seq_len)
    return end - request.prefix_len


def _fit(group: list[ExtendRequest], max_pages: int) -> bool:
    prefix = sum(request.first_touched for request in group)
    final = sum(_final_pages(request) for request in group)
    if group[0].quantized:
        return max(prefix, final) <= max_pages
    return prefix + final <= max_pages


def _group_passes(group: list[ExtendRequest]) -> list[AttentionPass]:
    """All passes of requests that fit together."""
    if not group:
        return []
    if not group[0].quantized:
        return [_causal_pass(group, 0)]
    longest = max(request.first_touched for request in group)
    leading = [_leading_pass(group, 0, longest)] if longest else []
    return [*leading, *_quantized_passes(group, merges=bool(leading))]


def _long_passes(request: ExtendRequest, max_pages: int) -> list[AttentionPass]:
    """All passes of one request whose prefix does not fit."""
    room = max(max_pages, _final_pages(request))
    num_leading = request.first_touched
    if not request.quantized:
        num_leading -= room - _final_pages(request)
    passes = [
        _leading_pass([request], begin, min(begin + room, num_leading))
        for begin in range(0, num_leading, room)
    ]
    if request.quantized:
        return [*passes, *_quantized_passes([request], merges=True)]
    return [*passes, _causal_pass([request], num_leading)]


def _leading_pass(group: list[ExtendRequest], begin: int, end: int) -> AttentionPass:
    """All queries of a group against the closed pages before them, `begin` to `end` at most."""
    fills: list[FillPlan] = []
    kv_lens: list[int] = []
    for request in group:
        last = min(end, request.first_touched)
        fills.append(closed_fill(request, begin, last, sum(kv_lens)))
        kv_lens.append((last - begin) * PAGE_SIZE)
    return _ragged_pass(group, fills, kv_lens, causal=False, merges=begin > 0)


def _causal_pass(group: list[ExtendRequest], begin: int) -> AttentionPass:
    """Exact prefill: closed pages from `begin` on, then the pages this step touches."""
    fills: list[FillPlan] = []
    kv_lens: list[int] = []
    for request in group:
        target = sum(kv_lens)
        fills.append(closed_fill(request, begin, request.num_closed, target))
        fills.append(touched_fill(request, target + (request.num_closed - begin) * PAGE_SIZE))
        kv_lens.append(request.seq_len - begin * PAGE_SIZE)
    return _ragged_pass(group, fills, kv_lens, causal=True, merges=begin > 0)


def _ragged_pass(
    group: list[ExtendRequest],
    fills: list[FillPlan],
    kv_lens: list[int],
    causal: bool,
    merges: bool,
) -> AttentionPass:
    return AttentionPass(
        fills=_fills(fills),
        q_begin=group[0].q_start,
        q_end=group[-1].q_end,
        qo_indptr=_indptr([request.q_end - request.q_start for request in group]),
        kv_indptr=_indptr(kv_lens),
        kv_indices=None,
        kv_last_page_len=None,
        causal=causal,
        merges=merges,
    )


def _quantized_passes(group: list[ExtendRequest], merges: bool) -> list[AttentionPass]:
    """Quantized prefill of the pages this step touches, each seen in codes by those after it.

    Two pages of queries, a whole tile of FlashInfer's fa3, share the codes of the pages before
    both. What is left for a page is its own rows and, if it is the second one, the first's codes.
    """
    if all(request.num_closed - request.first_touched < 2 for request in group):
        return [_own_pass(group, merges)]
    return [_pairs_pass(group, merges), _own_pass(group, merges=True)]


def _pairs_pass(group: list[ExtendRequest], merges: bool) -> AttentionPass:
    """Queries of two pages a sequence, against the codes of the touched pages before both."""
    fills: list[FillPlan] = []
    qo_lens, kv_pages = [], []
    next_page = 0
    for request in group:
        first = request.first_touched
        num_pages = (request.num_closed - first) // 2 * 2
        fills.append(closed_fill(request, first, first + num_pages, next_page * PAGE_SIZE))
        pages = next_page + np.arange(num_pages, dtype=np.int32)
        for page in range(first, request.last_page + 1, 2):
            qo_lens.append(_rows_until(request, page + 2) - _rows_until(request, page))
            kv_pages.append(pages[: page - first])
        next_page += num_pages
    last_lens = [PAGE_SIZE if len(pages) else 0 for pages in kv_pages]
    return _paged_pass(group, fills, qo_lens, kv_pages, last_lens, causal=False, merges=merges)


def _own_pass(group: list[ExtendRequest], merges: bool) -> AttentionPass:
    """Queries of one page a sequence: the codes of the first of its pair, its own 16-bit rows."""
    fills: list[FillPlan] = []
    qo_lens, kv_pages, last_lens = [], [], []
    next_page = 0
    for request in group:
        first = request.first_touched
        codes = np.arange(first, request.num_closed, 2, dtype=np.int32)
        own = next_page + len(codes)
        fills.append(page_fill(request, codes, next_page * PAGE_SIZE))
        fills.append(touched_fill(request, own * PAGE_SIZE))
        for n in range(request.num_touched):
            page = first + n
            qo_lens.append(_rows_until(request, page + 1) - _rows_until(request, page))
            before = [next_page + n // 2] if n % 2 else []
            kv_pages.append(np.array([*before, own + n], np.int32))
            last_lens.append(min(request.seq_len - page * PAGE_SIZE, PAGE_SIZE))
        next_page = own + request.num_touched
    return _paged_pass(group, fills, qo_lens, kv_pages, last_lens, causal=True, merges=merges)


def _paged_pass(
    group: list[ExtendRequest],
    fills: list[FillPlan],
    qo_lens: list[int],
    kv_pages: list[IntArray],
    last_lens: list[int],
    causal: bool,
    merges: bool,
) -> AttentionPass:
    """Sequences that share pages of the scratch buffer."""
    return AttentionPass(
        fills=_fills(fills),
        q_begin=group[0].q_start,
        q_end=group[-1].q_end,
        qo_indptr=_indptr(qo_lens),
        kv_indptr=_indptr([len(pages) for pages in kv_pages]),
        kv_indices=np.concatenate(kv_pages),
        kv_last_page_len=np.array(last_lens, np.int32),
        causal=causal,
        merges=merges,
    )


def _fills(parts: list[FillPlan]) -> FillPlan:
    def join(name: str) -> IntArray:
        return np.concatenate([getattr(part, name) for part in parts]).astype(np.int32)

    return FillPlan(join("request"), join("page"), join("touched"), join("target"))


def _indptr(lens: list[int]) -> IntArray:
    return np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
