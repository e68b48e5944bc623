"""Bring a plan to the device: one copy a step, without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.kernels.append.touched import TouchedPages
from sgl_kvq.kernels.common.upload import upload_columns
from sgl_kvq.kernels.extend.passes import ExtendPlan, FillPlan, ScratchFills
from sgl_kvq.memory_pool.storage import PagedCache, SlotMaps


@dataclass(frozen=True)
class ExtendBatch:
    """What every layer of an extend step needs besides q, k and v.

    Args:
        touched: Pages that get rows.
        fills: Pages that attention reads, an entry for each part of the plan.
        resumed_slots: int32 [m], open slots with the earlier rows of resumed pages.
    """

    touched: TouchedPages
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
    fills: list[FillPlan],
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    slots: SlotMaps,
) -> ExtendBatch:
    """Look up pages and slots of a plan on the device.

    Args:
        plan: The batch.
        fills: What attention reads, part by part.
        req_pool_indices: int [batch], row of each request.
        req_to_token: int32 [requests, context], token slots by position.
        slots: Which page has which slot.
    """
    touched, resumed = plan.touched, plan.resumed
    requests = [touched.request, *(fill.request for fill in fills)]
    indices = [touched.page, *(fill.page for fill in fills)]
    columns = upload_columns(
        {
            "request": np.concatenate(requests),
            "page": np.concatenate(indices),
            "prior": touched.resumed,
            "first": touched.first,
            "end": touched.end,
            "start": touched.start,
            "resumed": resumed,
            "touched": np.concatenate([resumed[:0], *(fill.touched for fill in fills)]),
            "target": np.concatenate([resumed[:0], *(fill.target for fill in fills)]),
        },
        req_to_token.device,
    )
    page_index = columns["page"].long()
    rows = req_pool_indices.long()[columns["request"].long()]
    pages = req_to_token[rows, page_index * PAGE_SIZE].int() // PAGE_SIZE
    is_first = (page_index == 0).int()
    sink_pages = slots.sink_page_of[pages].int() * is_first

    sizes = [len(fill.page) for fill in fills]
    count = len(touched.page)
    open_slots = slots.open_slot_of[pages[:count]].int()
    parts = (pages[count:], sink_pages[count:], columns["touched"], columns["target"])
    return ExtendBatch(
        touched=TouchedPages(
            pages=pages[:count],
            slots=open_slots,
            sink_pages=sink_pages[:count],
            prior=columns["prior"],
            first=columns["first"],
            end=columns["end"],
            start=columns["start"],
            is_first=is_first[:count],
        ),
        fills=[
            ScratchFills(
                pages=page,
                sink_pages=sink_page,
                touched=index,
                targets=target,
                has_touched=bool((fill.touched >= 0).any()),
                has_closed=bool((fill.touched < 0).any()),
            )
            for fill, page, sink_page, index, target in zip(
                fills, *(x.split(sizes) for x in parts), strict=True
            )
        ],
        resumed_slots=open_slots[columns["resumed"].long()],
    )
