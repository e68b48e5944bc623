"""Requests that grow step by step in a real `PagedStore`, for tests of the attention engines."""

from __future__ import annotations

import torch

from sgl_kvq.attention.engine import AttentionEngine
from sgl_kvq.attention.layer import LayerSpec
from sgl_kvq.attention.step import StepInput, StepMode
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.memory_pool.capacity import PoolPlan
from sgl_kvq.memory_pool.store import PagedStore
from testbed.formats import named_format
from tests.support.attention import random_rows
from tests.support.sink_rows import give_sink_rows

HEADS, GROUP, HEAD_DIM, SINKS, NUM_LAYERS = 2, 3, 64, 4, 2
MAX_LEN, MAX_BATCH = 512, 8


def make_store(name: str, device: str = "cpu") -> PagedStore:
    """A store of poisoned rows and pages."""
    layout = PageLayout(named_format(name), HEAD_DIM, HEADS)
    num_pages = 2 * MAX_BATCH * MAX_LEN // PAGE_SIZE
    store = PagedStore(PoolPlan((layout,) * NUM_LAYERS, SINKS, num_pages, MAX_BATCH), device)
    for cache in store.layers:
        cache.pages.fill_(0xFF)
        cache.open_rows.fill_(torch.nan)
        cache.sink_rows.fill_(torch.nan)
    return store


def make_layers(store: PagedStore) -> list[LayerSpec]:
    """Attention layers over a store."""
    return [
        LayerSpec(i, layout, HEADS * GROUP, HEAD_DIM**-0.5, None)
        for i, layout in enumerate(store.plan.layouts)
    ]


class GrowingRequests:
    """Requests with their pages and slots, run by an engine.

    Slots go by the allocator's rule: a page holds an open slot until the step that writes its 64th
    row, and takes over that of the page before it if both are open in one step.

    Args:
        store: Where they live.
        totals: Tokens of each request in the end.
        seed: Of their rows.
    """

    def __init__(self, store: PagedStore, totals: list[int], seed: int) -> None:
        self.store, self.device = store, store.device
        self.generator = torch.Generator().manual_seed(seed)
        counts = [-(-n // PAGE_SIZE) for n in totals]
        pages = torch.randperm(store.plan.num_pages, generator=self.generator)[: sum(counts)] + 1
        self.pages = list(pages.to(self.device).split(counts))
        self.lens = [0] * len(totals)
        self.req_to_token = torch.zeros(
            (MAX_BATCH + 1, MAX_LEN), dtype=torch.int32, device=self.device
        )
        for row, own in enumerate(self.pages, 1):
            tokens = own[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device=self.device)
            self.req_to_token[row, : tokens.numel()] = tokens.flatten()
        heads = (HEADS * GROUP, HEADS, HEADS)
        self.qkv = [  # by layer, tensor, request
            [[self._rows(n, h) for n in totals] for h in heads] for _ in range(NUM_LAYERS)
        ]

    def _rows(self, num_rows: int, heads: int) -> torch.Tensor:
        return random_rows((num_rows, heads, HEAD_DIM), self.generator).to(self.device)

    def step(
        self, engine: AttentionEngine, requests: list[int], chunks: list[int], decode: bool = False
    ) -> list[torch.Tensor]:
        """Run the next tokens of some requests; returns the output of each layer."""
        prefix_lens = [self.lens[r] for r in requests]
        for r, n in zip(requests, chunks, strict=True):
            self._take_slots(r, self.lens[r] + n)
            self.lens[r] += n
        engine.plan(
            StepInput(
                StepMode.DECODE if decode else StepMode.EXTEND,
                torch.tensor([r + 1 for r in requests], device=self.device),
                torch.tensor([self.lens[r] for r in requests], device=self.device),
                prefix_lens,
                chunks,
            )
        )
        outs = []
        attend = engine.decode if decode else engine.extend
        for layer in make_layers(self.store):
            q, k, v = (
                torch.cat(
                    [
                        rows[r][prefix_len : self.lens[r]]
                        for r, prefix_len in zip(requests, prefix_lens, strict=True)
                    ]
                )
                for rows in self.qkv[layer.layer_id]
            )
            outs.append(attend(q, k, v, layer))
        return outs

    def _take_slots(self, request: int, seq_len: int) -> None:
        prefix_len, slots = self.lens[request], self.store.open_slots
        before = self.pages[request][[prefix_len // PAGE_SIZE]] if prefix_len % PAGE_SIZE else None
        last = self.pages[request][[(seq_len - 1) // PAGE_SIZE]]
        if prefix_len == 0:
            give_sink_rows(self.store, self.pages[request][:1])
        if before is None:
            if seq_len % PAGE_SIZE:
                slots.acquire(last)
        elif seq_len % PAGE_SIZE == 0:
            slots.release(before)
        elif int(before) != int(last):
            slots.transfer(before, last)
