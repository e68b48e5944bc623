"""What an extend batch is cut into: pages to write, attention passes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TouchedPlan:
    """Pages that get fresh rows; int32 [n] each, requests one after the other.

    Args:
        request: Which request of the batch.
        page: Page index in its sequence.
        resumed: Which of the resumed pages (those with rows of earlier steps) this is, else 0.
        first: First fresh row in the page.
        end: One after the last fresh row.
        start: Row of k and v that becomes row `first`.
    """

    request: IntArray
    page: IntArray
    resumed: IntArray
    first: IntArray
    end: IntArray
    start: IntArray


@dataclass(frozen=True)
class FillPlan:
    """Pages to write to the scratch buffer; int32 [n] each.

    Args:
        request: Which request of the batch.
        page: Page index in its sequence.
        touched: Index of the touched page whose 16-bit rows to copy; -1: dequantize the codes.
        target: Token of the scratch buffer where row 0 goes.
    """

    request: IntArray
    page: IntArray
    touched: IntArray
    target: IntArray


@dataclass(frozen=True)
class AttentionPass:
    """One attention call: rows `q_begin` to `q_end` of q against what `fills` wrote.

    Args:
        fills: What the scratch buffer holds.
        q_begin, q_end: Rows of q.
        qo_indptr: int32 [n + 1], rows of q of each sequence, counted from `q_begin`.
        kv_indptr: int32 [n + 1], tokens of the scratch buffer, or entries of `kv_indices`.
        kv_indices: int32 pages of the scratch buffer, so that sequences may share them; None: the
            keys of a sequence lie in one piece.
        kv_last_page_len: int32 [n], rows in the last page; None without `kv_indices`.
        causal: The last query sees the last key, the one before it one less, and so on.
        merges: These rows have a result already, of other keys.
    """

    fills: FillPlan
    q_begin: int
    q_end: int
    qo_indptr: IntArray
    kv_indptr: IntArray
    kv_indices: IntArray | None
    kv_last_page_len: IntArray | None
    causal: bool
    merges: bool


@dataclass(frozen=True)
class ExtendPlan:
    """A batch: what is written, and the passes that attend to it.

    Args:
        touched: Pages that get fresh rows.
        resumed_requests: int32 [m], requests whose first touched page has rows of earlier steps.
        passes: In the order to run them.
        scratch_pages: Largest number of pages a pass fills.
    """

    touched: TouchedPlan
    resumed_requests: IntArray
    passes: list[AttentionPass]
    scratch_pages: int
