"""Which page row holds the sink rows of which first page."""

from __future__ import annotations

import torch


class SinkPages:
    """The second page row of each page that holds position 0 of a sequence.

    A page keeps it from allocation to release; every other page maps to row 0, which is padding.
    Nothing here waits for the device: rows given up are noted there and counted when `reclaim`
    asks for them.

    Args:
        num_rows: Page rows besides the padding one.
        device: Where the table lives.

    Attributes:
        num_held: Rows handed out and not yet reclaimed, those given up included.
    """

    name = "sink rows"

    def __init__(self, num_rows: int, device: str) -> None:
        self._row_of = torch.empty(num_rows + 1, dtype=torch.int64, device=device)
        self.clear()

    def clear(self) -> None:
        """Take every row back."""
        self._row_of.zero_()
        self.num_held = 0
        self._given_up: list[torch.Tensor] = []

    def held_slot(self, pages: torch.Tensor) -> torch.Tensor:
        """Page row with the sink rows of each page (int64 [n]), 0 where it has none."""
        return self._row_of[pages]

    def step_view(self) -> torch.Tensor:
        """The table itself, int64 [num_rows + 1]: it keeps its address and follows each change."""
        return self._row_of

    def attach(self, first_pages: torch.Tensor, rows: torch.Tensor) -> None:
        """Give first pages their sink rows (both int64 [n])."""
        self._row_of[first_pages] = rows
        self.num_held += len(rows)

    def detach(self, pages: torch.Tensor) -> None:
        """Note the sink rows of pages (int64 [n]) that are released; most have none."""
        self._given_up.append(self._row_of[pages])
        self._row_of[pages] = 0

    def reclaim(self) -> torch.Tensor:
        """Return the rows that released pages gave up, int64 [n] (waits for the device)."""
        if not self._given_up:
            return self._row_of[:0]
        rows = torch.cat(self._given_up)
        rows = rows[rows > 0]
        self._given_up = []
        self.num_held -= len(rows)
        return rows

    @property
    def num_given_up(self) -> int:
        """Released pages whose sink rows, if any, await `reclaim`."""
        return sum(map(len, self._given_up))

    def num_used(self) -> int:
        """First pages that hold a row (waits for the device)."""
        return int(self.count_used())

    def count_used(self) -> torch.Tensor:
        """First pages that hold a row, an int64 scalar on the device."""
        return (self._row_of > 0).sum()
