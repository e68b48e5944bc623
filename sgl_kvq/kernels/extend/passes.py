"""What an extend batch is cut into: requests, pages to write, attention passes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sgl_kvq.formats.base import PAGE_SIZE

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class ExtendRequest:
    """One request of a batch; positions and pages count from the start of its sequence.

    Args:
        index: Its place in the batch.
        prefix_len: Tokens cached before this step.
        seq_len: Tokens after it.
        q_start: Its first row in q.
        touched_start: Its first page in the step's touched pages; that page holds position
            `prefix_len`.
        quantized: Quantized prefill: queries read every closed page in codes, also one that closes
            in this step; otherwise only those closed before it.
    """

    index: int
    prefix_len: int
    seq_len: int
    q_start: int
    touched_start: int
    quantized: bool

    @property
    def q_end(self) -> int:
        """One after its last row in q."""
        return self.q_start + self.seq_len - self.prefix_len

    @property
    def first_touched(self) -> int:
        """First page that gets rows."""
        return self.prefix_len // PAGE_SIZE

    @property
    def last_page(self) -> int:
        """Page of the last token."""
        return (self.seq_len - 1) // PAGE_SIZE

    @property
    def num_touched(self) -> int:
        """Pages that get rows."""
        return self.last_page - self.first_touched + 1

    @property
    def num_closed(self) -> int:
        """Pages that are read in codes: those before it; in quantized mode all but the last one."""
        return self.last_page if self.quantized else self.first_touched


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

    def where(self, mask: npt.NDArray[np.bool_]) -> FillPlan:
        """The entries that a mask [n] chooses."""
        return FillPlan(self.request[mask], self.page[mask], self.touched[mask], self.target[mask])


@dataclass(frozen=True)
class ScratchFills:
    """A `FillPlan` on the device, its pages looked up; every tensor is int32.

    Args:
        pages: [n], page row to dequantize.
        sink_pages: [n], page row with the sink rows of a closed first page; 0 for others.
        targets: [n], token of the scratch buffer where row 0 goes.
        num_pages: [1], how many of the n there are; the rest is padding.
        touched: [m], index of the touched page whose 16-bit rows to copy; -1: padding.
        row_targets: [m], token of the scratch buffer where row 0 of those goes.
    """

    pages: torch.Tensor
    sink_pages: torch.Tensor
    targets: torch.Tensor
    num_pages: torch.Tensor
    touched: torch.Tensor
    row_targets: torch.Tensor


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
    """A batch: who runs, and what is written.

    Args:
        requests: In the order of q.
        touched: Pages that get fresh rows.
        resumed: int32 [m], which of them have rows of earlier steps.
    """

    requests: list[ExtendRequest]
    touched: TouchedPlan
    resumed: IntArray
