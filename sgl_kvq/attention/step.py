"""The shape of one forward, in terms of this package."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch

from sgl_kvq.memory_pool.storage import SlotMaps
from sgl_kvq.memory_pool.store import PagedStore


class StepMode(Enum):
    """What a forward does with the requests of its batch."""

    DECODE = "decode"
    """One fresh token each."""

    EXTEND = "extend"
    """Any number of fresh tokens each, behind those that are cached."""

    IDLE = "idle"
    """No requests: a rank takes part only because others have some."""


@dataclass(frozen=True)
class StepInput:
    """One forward: who runs and how long they are.

    The engines read nothing else of a batch, except the tables of tokens and slots.

    Args:
        mode: What it does.
        req_pool_indices: int [batch] on the device, row of each request in the token table.
        seq_lens: int [batch] on the device, tokens of each request, fresh ones included.
        prefix_lens: Cached tokens of each request; extend only.
        extend_lens: Fresh tokens of each request, at least 1; extend only.
    """

    mode: StepMode
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    prefix_lens: list[int] = field(default_factory=list)
    extend_lens: list[int] = field(default_factory=list)


def step_slots(store: PagedStore) -> SlotMaps:
    """Slots of the pages of a step; views that follow the tables.

    A step reads the slot of a page that belongs to one of its own requests. Such a page holds its
    slot, or it gave it up in this very step, because its 64th token is among the fresh ones; the
    rows are still there, as nobody else writes before this step.
    """
    return SlotMaps(store.open_slots.step_view(), store.sink_pages.step_view())
