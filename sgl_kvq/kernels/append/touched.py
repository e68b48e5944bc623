"""The pages that an extend step writes rows to, as its kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TouchedPages:
    """Pages that get rows in an extend step; every tensor is int32 [n].

    Args:
        pages: Where the bytes go if the page fills.
        slots: Open slot the rows go to if the page stays open.
        sink_pages: Page row for the sink rows; used by first pages that fill.
        prior: Index into the prior rows, where the page's earlier rows lie.
        first: First fresh row in the page; earlier ones come from the prior rows.
        end: One after the last fresh row; 64 fills the page, 0 is padding.
        start: Row of k and v that becomes row `first`.
        is_first: 1 where the page holds position 0.
    """

    pages: torch.Tensor
    slots: torch.Tensor
    sink_pages: torch.Tensor
    prior: torch.Tensor
    first: torch.Tensor
    end: torch.Tensor
    start: torch.Tensor
    is_first: torch.Tensor
