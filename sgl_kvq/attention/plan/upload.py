"""Index tensors of an extend batch on the device, made once a forward without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.kernels.append.api import TouchedPages
from sgl_kvq.kernels.extend.api import ScratchFills
from sgl_kvq.kernels.extend.passes import (
    AttentionPass,
    ExtendPlan,
    FillPlan,
    IntArray,
    TouchedPlan,
)
from sgl_kvq.memory_pool.storage import PagedCache, SlotMaps


@dataclass(frozen=True)
class ExtendBatch:
    """What every layer of an extend step needs besides q, k and v.

    Args:
        touched: Pages that get rows.
        passes: Attention passes.
        fills: Of each pass.
        resumed_slots: int32 [m], open slots with the earlier rows of resumed pages.
    """

    touched: TouchedPages
    passes: list[AttentionPass]
    fills: list[ScratchFills]
    resumed_slots: torch.Tensor

    def prior_rows(self, cache: PagedCache) -> torch.Tensor:
        """Copy the earlier rows of resumed pages, before their slots are written.

        Returns:
            [max(m, 1), 2, PAGE_SIZE, num_kv_heads, head_dim].
        """
        if len(self.resumed_slots) == 0:
            return cache.open_rows[:1]
        return torch.index_select(cache.open_rows, 0, self.resumed_slots)


def upload_extend(
    plan: ExtendPlan,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    slots: SlotMaps,
) -> ExtendBatch:
    """Look up pages and slots of a plan on the device.

    Args:
        plan: The batch.
        req_to_token: int32 [requests, context], token slots by position.
        req_pool_indices: int [batch], row of each request.
        slots: Which page has which slot.
    """
    device = req_to_token.device
    touched = plan.touched
    parts: list[TouchedPlan | FillPlan] = [touched, *(step.fills for step in plan.passes)]
    sizes = [len(part.page) for part in parts]
    columns = [
        *(part.request for part in parts),
        *(part.page for part in parts),
        *(touched.resumed, touched.first, touched.end, touched.start),
        *(step.fills.touched for step in plan.passes),
        *(step.fills.target for step in plan.passes),
        plan.resumed_requests,
        _first_touched(plan),
    ]
    host = torch.from_numpy(np.concatenate(columns))
    if device.type == "cuda":
        host = host.pin_memory()
    uploaded = host.to(device, non_blocking=True).split([len(column) for column in columns])
    count = len(parts)
    request = torch.cat(uploaded[:count]).long()
    page_index = torch.cat(uploaded[count : 2 * count])
    rows = req_pool_indices.long()[request]
    pages = req_to_token[rows, page_index.long() * PAGE_SIZE].int() // PAGE_SIZE
    is_first = (page_index == 0).int()
    sink_slots = slots.sink_slot_of[pages].int() * is_first
    prior, first, end, start = uploaded[2 * count : 2 * count + 4]
    fill_columns = uploaded[2 * count + 4 :]
    num_passes = len(plan.passes)
    page_parts, sink_parts = pages.split(sizes), sink_slots.split(sizes)
    fills = [
        ScratchFills(
            pages=page_parts[n + 1],
            sink_slots=sink_parts[n + 1],
            touched=fill_columns[n],
            targets=fill_columns[num_passes + n],
        )
        for n in range(num_passes)
    ]
    return ExtendBatch(
        touched=TouchedPages(
            pages=page_parts[0],
            slots=slots.open_slot_of[page_parts[0]].int(),
            sink_slots=sink_parts[0],
            prior=prior,
            first=first,
            end=end,
            start=start,
            is_first=is_first.split(sizes)[0],
        ),
        passes=plan.passes,
        fills=fills,
        resumed_slots=_resumed_slots(
            fill_columns[-2], fill_columns[-1], req_to_token, req_pool_indices, slots
        ),
    )


def _first_touched(plan: ExtendPlan) -> IntArray:
    """Index of the page that each resumed request goes on with."""
    touched = plan.touched
    is_start = np.searchsorted(touched.request, plan.resumed_requests, side="left")
    return touched.page[is_start]


def _resumed_slots(
    request: torch.Tensor,
    page_index: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    slots: SlotMaps,
) -> torch.Tensor:
    rows = req_pool_indices.long()[request.long()]
    pages = req_to_token[rows, page_index.long() * PAGE_SIZE].long() // PAGE_SIZE
    return slots.open_slot_of[pages].int()
