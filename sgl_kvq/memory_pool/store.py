"""The memory of one rank's pool: page rows, 16-bit rows, and which page holds which slot."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.memory_pool.capacity import PoolPlan
from sgl_kvq.memory_pool.sinks import SinkPages
from sgl_kvq.memory_pool.slots import SlotTable
from sgl_kvq.memory_pool.storage import PagedCache, sink_rows_of


class PagedStore:
    """Closed pages as opaque bytes, open pages and sink tokens as 16-bit rows.

    One uint8 row a page and layer holds codes, scales and minima. The allocator says which pages
    hold an open slot (a running request writes them) and which a further page row for sink rows
    (they hold position 0 of a sequence); both go with the page when it is freed.

    Args:
        plan: Sizes.
        device: Where everything lives.
        start_layer: Id of the first layer of this rank.
        region: Entered while the storage is allocated (SGLang's memory saver).

    Attributes:
        layers: Storage of each layer of this rank, in order.
        open_slots: Slots of pages that are still written.
        sink_pages: Page rows that hold the sink rows of first pages.
        num_nonfinite: int64 scalar on the device, elements replaced because no code could hold
            them (not finite, or too large).
    """

    def __init__(
        self,
        plan: PoolPlan,
        device: str,
        start_layer: int = 0,
        region: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.plan, self.device, self.layout = plan, device, plan.layout
        self.start_layer = start_layer
        with region or nullcontext():
            self.layers = [self._allocate_layer(layout) for layout in plan.layouts]
        self.open_slots = SlotTable("open pages", plan.open_slots, plan.num_rows, device)
        self.sink_pages = SinkPages(plan.num_rows, device)
        self.num_nonfinite = torch.zeros((), dtype=torch.int64, device=device)

    def _allocate_layer(self, layout: PageLayout) -> PagedCache:
        plan, heads = self.plan, (layout.num_kv_heads, layout.head_dim)

        def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        pages = zeros(torch.uint8, plan.num_rows + 1, layout.page_bytes)
        return PagedCache(
            pages=pages,
            open_rows=zeros(layout.row_dtype, plan.open_slots + 1, 2, PAGE_SIZE, *heads),
            sink_rows=sink_rows_of(pages, layout, plan.sink_tokens),
        )

    def layer(self, layer_id: int) -> PagedCache:
        """Storage of one layer."""
        return self.layers[layer_id - self.start_layer]

    def layout_of(self, layer_id: int) -> PageLayout:
        """Layout of one layer's pages."""
        return self.plan.layouts[layer_id - self.start_layer]

    def copy_to_host(self, slots: torch.Tensor) -> dict[str, Any]:
        """Copy a request's whole cache to the host.

        Args:
            slots: int64 [tokens], its token slots from position 0 on.

        Returns:
            What `copy_from_host` takes.
        """
        pages = slots[::PAGE_SIZE].long() // PAGE_SIZE
        open_slot = self.open_slots.held_slot(pages[-1:])
        sink_row = self.sink_pages.held_slot(pages[:1])
        return {
            "num_tokens": len(slots),
            "pages": [layer.pages[pages].cpu() for layer in self.layers],
            "open_rows": [layer.open_rows[open_slot].cpu() for layer in self.layers],
            "sink_rows": [layer.sink_rows[sink_row].cpu() for layer in self.layers],
        }

    def copy_from_host(self, copy: dict[str, Any], slots: torch.Tensor) -> None:
        """Write what `copy_to_host` returned into freshly allocated slots.

        Args:
            copy: The copy.
            slots: int64 [tokens], the new token slots, from position 0 on.

        Raises:
            ValueError: another number of tokens than was copied.
        """
        if len(slots) != copy["num_tokens"]:
            raise ValueError(f"indices: expected {copy['num_tokens']} slots, got {len(slots)}")
        pages = slots[::PAGE_SIZE].long() // PAGE_SIZE
        open_slot = self.open_slots.held_slot(pages[-1:])
        sink_row = self.sink_pages.held_slot(pages[:1])
        for i, layer in enumerate(self.layers):
            layer.pages[pages] = copy["pages"][i].to(self.device)
            layer.open_rows[open_slot] = copy["open_rows"][i].to(self.device)
            layer.sink_rows[sink_row] = copy["sink_rows"][i].to(self.device)

    def move(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Move tokens between slots: rows inside open pages, or whole closed pages.

        Args:
            target: int64 [n], token slots to write.
            source: int64 [n], token slots to read; all are read before any is written.

        Raises:
            ValueError: part of a closed page would be moved: its tokens share scales.
        """
        target_pages, source_pages = target.long() // PAGE_SIZE, source.long() // PAGE_SIZE
        target_slots, source_slots = (
            self.open_slots.held_slot(pages) for pages in (target_pages, source_pages)
        )
        if bool((target_slots > 0).all() and (source_slots > 0).all()):
            target_row, source_row = target % PAGE_SIZE, source % PAGE_SIZE
            for layer in self.layers:
                rows = layer.open_rows[source_slots, :, source_row]
                layer.open_rows[target_slots, :, target_row] = rows
            return
        whole = torch.arange(PAGE_SIZE, device=target.device).repeat(len(target) // PAGE_SIZE)
        if len(target) % PAGE_SIZE or not all(
            torch.equal(slots.long() % PAGE_SIZE, whole) for slots in (target, source)
        ):
            raise ValueError(
                f"move_kv_cache: expected slots of open pages, or whole closed pages of "
                f"{PAGE_SIZE} slots, got {len(target)} slots that split a closed page"
            )
        self._move_pages(target_pages[::PAGE_SIZE], source_pages[::PAGE_SIZE])

    def _move_pages(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target_sinks, source_sinks = map(self.sink_pages.held_slot, (target, source))
        both = (target_sinks > 0) & (source_sinks > 0)
        for layer in self.layers:
            layer.pages[target] = layer.pages[source]
            layer.sink_rows[target_sinks[both]] = layer.sink_rows[source_sinks[both]]
