"""Which page owns which slot of 16-bit rows, kept on the device without host syncs."""

from __future__ import annotations

import torch

from sgl_kvq.errors import PoolExhaustedError

_FREE = 0
_PADDING = -1


class SlotTable:
    """Slots handed to pages and taken back.

    A page's entry in the table of slots stays after it gives the slot up, so that work already
    queued on the device still finds the rows. Such an entry says nothing about the slot's present
    owner: only a step may read the table, through `step_view`; everybody else asks `held_slot`.
    Slot 0 and page 0 are padding: every page that never had a slot maps to slot 0.

    Args:
        name: For messages.
        num_slots: Slots besides the padding one.
        num_pages: Pages besides the padding one.
        device: Where the tables live.
    """

    def __init__(self, name: str, num_slots: int, num_pages: int, device: str) -> None:
        self.name = name
        self.num_slots = num_slots
        self._owner = torch.empty(num_slots + 1, dtype=torch.int64, device=device)
        self._slot_of = torch.empty(num_pages + 1, dtype=torch.int64, device=device)
        self.clear()

    def clear(self) -> None:
        """Free every slot."""
        self._owner.fill_(_FREE)
        self._owner[0] = _PADDING
        self._slot_of.zero_()

    def num_free(self) -> int:
        """Free slots (waits for the device)."""
        return int((self._owner == _FREE).sum())

    def num_used(self) -> int:
        """Slots a page holds (waits for the device)."""
        return self.num_slots - self.num_free()

    def count_used(self) -> torch.Tensor:
        """Slots a page holds, an int64 scalar on the device."""
        return (self._owner > _FREE).sum()

    def held_slot(self, pages: torch.Tensor) -> torch.Tensor:
        """Slot each page (int64 [n]) holds now, 0 where it holds none."""
        slots = self._slot_of[pages]
        return torch.where(self._owner[slots] == pages, slots, 0)

    def step_view(self) -> torch.Tensor:
        """Slot each page holds or held last, for the pages of a step that is being queued.

        A page that gives its slot up in this step, because its last row is among the fresh ones,
        is still found. Of any other page that holds none, the slot may be somebody else's.

        Returns:
            int64 [num_pages + 1], the table itself: it keeps its address and follows each change.
        """
        return self._slot_of

    def acquire(self, pages: torch.Tensor) -> None:
        """Give each page a free slot.

        Args:
            pages: int64 [n], distinct pages without a slot.

        Raises:
            PoolExhaustedError: fewer than n slots are free. Admission keeps one slot for each
                running request, so that this is our own mistake. On a GPU the device checks it
                when it gets there, and ends the process: two pages must never share rows.
        """
        count = len(pages)
        if count == 0:
            return
        if self._owner.device.type == "cpu" and self.num_free() < count:
            raise PoolExhaustedError(
                f"{self.name}: {count} slots wanted, {self.num_free()} of {self.num_slots} free"
            )
        slots = torch.argsort((self._owner != _FREE).to(torch.uint8), stable=True)[:count]
        if self._owner.is_cuda:
            torch._assert_async(self._owner[slots[-1]] == _FREE, f"{self.name}: no slot is free")
        self._owner[slots] = pages
        self._slot_of[pages] = slots

    def transfer(self, old_pages: torch.Tensor, new_pages: torch.Tensor) -> None:
        """Hand the slots of `old_pages`, which must hold one, to `new_pages` (both int64 [n])."""
        slots = self._slot_of[old_pages]
        self._owner[slots] = new_pages
        self._slot_of[new_pages] = slots

    def release(self, pages: torch.Tensor) -> None:
        """Take back the slots that these pages (int64 [n]) still hold; others are left alone."""
        slots = self._slot_of[pages]
        owner = self._owner[slots]
        # Several pages may point at one slot, of which at most one holds it: the minimum decides.
        kept = torch.where(owner == pages, _FREE, owner)
        self._owner.scatter_reduce_(0, slots, kept, "amin")
