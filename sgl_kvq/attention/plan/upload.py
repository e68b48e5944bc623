"""Bring the plan of an extend step to the device: one copy, without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.kernels.append.touched import TouchedPages
from sgl_kvq.kernels.common.upload import copy_from_host
from sgl_kvq.kernels.extend.passes import ExtendPlan, FillPlan, IntArray, ScratchFills
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

    def first_touched(self, count: int) -> ExtendBatch:
        """The same batch with room for the first `count` touched pages."""
        touched = {field.name: getattr(self.touched, field.name) for field in fields(self.touched)}
        cut = TouchedPages(**{name: column[:count] for name, column in touched.items()})
        fills = [
            replace(fill, touched=fill.touched[:count], row_targets=fill.row_targets[:count])
            for fill in self.fills
        ]
        return replace(self, touched=cut, fills=fills)


@dataclass(frozen=True)
class ExtendSizes:
    """Room for the plan of an extend step.

    Args:
        touched: Pages that get rows.
        resumed: Those of them with rows of earlier steps.
        closed: Pages to dequantize, of each part.
        copied: Touched pages whose rows are copied, of each part.
    """

    touched: int
    resumed: int
    closed: tuple[int, ...]
    copied: tuple[int, ...]

    @classmethod
    def of(cls, plan: ExtendPlan, fills: list[FillPlan]) -> ExtendSizes:
        """What a plan takes."""
        copied = tuple(int((fill.touched >= 0).sum()) for fill in fills)
        closed = tuple(len(fill.page) - n for fill, n in zip(fills, copied, strict=True))
        return cls(len(plan.touched.page), len(plan.resumed), closed, copied)

    def hold(self, other: ExtendSizes) -> bool:
        """Whether a plan of other sizes fits."""
        return (
            other.touched <= self.touched
            and other.resumed <= self.resumed
            and len(other.closed) == len(self.closed)
            and all(a <= b for a, b in zip(other.closed, self.closed, strict=True))
            and all(a <= b for a, b in zip(other.copied, self.copied, strict=True))
        )


class ExtendTables:
    """Device memory that holds the plan of one extend step after the other.

    Args:
        sizes: Room for a plan; smaller ones are padded.
        device: Where.

    Attributes:
        batch: Views of it, always the same.
    """

    def __init__(self, sizes: ExtendSizes, device: torch.device | str) -> None:
        self.sizes = sizes
        num_parts, num_pages = len(sizes.closed), sizes.touched + sum(sizes.closed)
        lens = {"request": num_pages, "page": num_pages, "is_first": num_pages}
        lens |= dict.fromkeys(("prior", "first", "end", "start"), sizes.touched)
        lens |= {"resumed": sizes.resumed, "target": sum(sizes.closed), "num_pages": num_parts}
        lens |= {"copied": sum(sizes.copied), "row_target": sum(sizes.copied)}
        bounds = np.cumsum([0, *lens.values()])
        self._slices = {name: slice(*bounds[i : i + 2]) for i, name in enumerate(lens)}
        self._columns = torch.zeros(int(bounds[-1]), dtype=torch.int32, device=device)
        self._looked_up = torch.zeros((3, num_pages), dtype=torch.int32, device=device)
        self._resumed_slots = torch.zeros(sizes.resumed, dtype=torch.int32, device=device)
        self.batch = self._views()

    def _views(self) -> ExtendBatch:
        sizes = self.sizes
        of = {name: self._columns[where] for name, where in self._slices.items()}
        touched, closed = self._looked_up.split([sizes.touched, sum(sizes.closed)], dim=1)
        pages, sink_pages, slots = touched
        by_part = zip(
            *(x.split(sizes.closed) for x in (*closed[:2], of["target"])),
            of["num_pages"].split(1),
            *(of[name].split(sizes.copied) for name in ("copied", "row_target")),
            strict=True,
        )
        return ExtendBatch(
            touched=TouchedPages(
                pages=pages,
                slots=slots,
                sink_pages=sink_pages,
                prior=of["prior"],
                first=of["first"],
                end=of["end"],
                start=of["start"],
                is_first=of["is_first"][: sizes.touched],
            ),
            fills=[ScratchFills(*part) for part in by_part],
            resumed_slots=self._resumed_slots,
        )

    def update(
        self,
        plan: ExtendPlan,
        fills: list[FillPlan],
        req_pool_indices: torch.Tensor,
        req_to_token: torch.Tensor,
        slots: SlotMaps,
    ) -> None:
        """Write a plan; look up its pages and slots.

        Args:
            plan: The batch.
            fills: What attention reads, part by part.
            req_pool_indices: int [batch], row of each request.
            req_to_token: int32 [requests, context], token slots by position.
            slots: Which page has which slot.
        """
        host = np.zeros(len(self._columns), np.int32)
        self._fill(host, plan, fills)
        copy_from_host(self._columns, host)
        request, index, is_first = (
            self._columns[self._slices[name]] for name in ("request", "page", "is_first")
        )
        rows = req_pool_indices.long()[request.long()]
        pages = req_to_token[rows, index.long() * PAGE_SIZE] // PAGE_SIZE
        self._looked_up[0] = pages
        self._looked_up[1] = slots.sink_page_of[pages.long()] * is_first
        self._looked_up[2] = slots.open_slot_of[pages.long()]
        resumed = self._columns[self._slices["resumed"]]
        torch.index_select(self._looked_up[2], 0, resumed, out=self._resumed_slots)

    def _fill(self, host: IntArray, plan: ExtendPlan, fills: list[FillPlan]) -> None:
        """Write the columns; padding has `end` 0, `copied` -1 and page 0 of the first request."""
        sizes, touched = self.sizes, plan.touched

        def write(name: str, parts: list[IntArray], room: tuple[int, ...]) -> None:
            column = host[self._slices[name]]
            for begin, part in zip(np.cumsum([0, *room]), parts, strict=False):
                column[begin : begin + len(part)] = part

        closed = [fill.where(fill.touched < 0) for fill in fills]
        copied = [fill.where(fill.touched >= 0) for fill in fills]
        pages = (sizes.touched, *sizes.closed)
        index = [touched.page, *(fill.page for fill in closed)]
        write("request", [touched.request, *(fill.request for fill in closed)], pages)
        write("page", index, pages)
        write("is_first", [(page == 0).astype(np.int32) for page in index], pages)
        for name in ("first", "end", "start"):
            write(name, [getattr(touched, name)], (sizes.touched,))
        write("prior", [touched.resumed], (sizes.touched,))
        write("resumed", [plan.resumed], (sizes.resumed,))
        write("target", [fill.target for fill in closed], sizes.closed)
        host[self._slices["num_pages"]] = [len(fill.page) for fill in closed]
        host[self._slices["copied"]] = -1
        write("copied", [fill.touched for fill in copied], sizes.copied)
        write("row_target", [fill.target for fill in copied], sizes.copied)


def upload_extend(
    plan: ExtendPlan,
    fills: list[FillPlan],
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    slots: SlotMaps,
) -> ExtendBatch:
    """A plan in device memory of its own; arguments as of `ExtendTables.update`."""
    tables = ExtendTables(ExtendSizes.of(plan, fills), req_to_token.device)
    tables.update(plan, fills, req_pool_indices, req_to_token, slots)
    return tables.batch
