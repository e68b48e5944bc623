"""Cut the prefixes that the fused kernel reads into items of similar size (pure arithmetic)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class FusedLimits:
    """When the fused kernel runs, and how work is cut for it.

    Args:
        gqa_group: Query heads of a KV head.
        block_rows: Packed query rows (tokens times `gqa_group`) of a block.
        num_programs: Programs for one KV head that run at once.
        max_rows: Packed rows of a request up to which it is faster than the scratch buffer.
        min_pages: Closed pages from which on it is.
    """

    gqa_group: int
    block_rows: int
    num_programs: int
    max_rows: int
    min_pages: int

    def takes(self, num_tokens: int, num_pages: int) -> bool:
        """Whether a request's fresh tokens attend to its closed pages with the fused kernel."""
        return num_pages >= self.min_pages and num_tokens * self.gqa_group <= self.max_rows


@dataclass(frozen=True)
class FusedPlan:
    """Work of the fused kernel; pages of a request lie one after the other.

    Args:
        request: int32 [n], which request of the batch a page belongs to.
        page: int32 [n], its index in the sequence.
        items: int32 [items, 5]: row of q of the request's first token, first packed row of the
            block, packed rows of the request, first page of the item, one after its last.
        blocks: int32 [blocks, 5]: the same three, first item of the block, one after its last.
    """

    request: IntArray
    page: IntArray
    items: IntArray
    blocks: IntArray


def plan_fused(requests: list[tuple[int, int, int, int]], limits: FusedLimits | None) -> FusedPlan:
    """Cut the prefixes of some requests.

    Args:
        requests: Index in the batch, first row of q, fresh tokens, closed pages of each.
        limits: How to cut; None if `requests` is empty.
    """
    request: list[int] = []
    page: list[int] = []
    items: list[tuple[int, ...]] = []
    blocks: list[tuple[int, ...]] = []
    if limits is not None:
        group, block_rows = limits.gqa_group, limits.block_rows
        units = sum(-(-tokens * group // block_rows) * pages for _, _, tokens, pages in requests)
        pages_per_item = max(1, -(-units // limits.num_programs))
    first_page = 0
    for index, q_start, num_tokens, num_pages in requests:
        request += [index] * num_pages
        page += range(num_pages)
        num_rows = num_tokens * group
        splits = max(1, num_pages // pages_per_item)
        cuts = [first_page + num_pages * n // splits for n in range(splits + 1)]
        for row in range(0, num_rows, block_rows):
            blocks.append((q_start, row, num_rows, len(items), len(items) + splits))
            items += [(q_start, row, num_rows, *cuts[n : n + 2]) for n in range(splits)]
        first_page += num_pages
    return FusedPlan(
        np.array(request, np.int32),
        np.array(page, np.int32),
        np.array(items, np.int32).reshape(-1, 5),
        np.array(blocks, np.int32).reshape(-1, 5),
    )
