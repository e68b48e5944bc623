"""CUDA graphs of extend attention: one layer's launches for one shape of a step."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch

from sgl_kvq.attention.plan.upload import ExtendBatch, ExtendSizes, ExtendTables
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.kernels.extend.passes import AttentionPass, ExtendPlan, FillPlan
from sgl_kvq.kernels.extend.prefill_attention import CapturableAttention
from sgl_kvq.memory_pool.storage import SlotMaps

MAX_TOKENS = 1024
"""Tokens of a step in a graph: with more, the GPU takes longer than the launches."""

MAX_REQUESTS = 64
MAX_RESUMED = 4
"""Requests that continue inside a page; prefixes found in the cache are whole pages."""


def _max_touched(num_tokens: int) -> int:
    """Pages that get rows in a step of so many tokens."""
    return min(num_tokens, num_tokens // PAGE_SIZE + 2 * MAX_REQUESTS)


class ExtendGraphs:
    """Graphs over tables and lengths at fixed places, which each step writes anew.

    A step fits if one causal pass over the scratch buffer computes it, within the bounds above.

    Args:
        attention: Computes the pass.
        max_pages: Pages of the scratch buffer.
        device: A GPU.

    Attributes:
        batch: The step's pages, as captured launches read them.
        planned: Whether the tables hold the step that was planned last.
    """

    def __init__(
        self, attention: CapturableAttention, max_pages: int, device: torch.device | str
    ) -> None:
        touched = _max_touched(MAX_TOKENS)
        sizes = ExtendSizes(touched, MAX_RESUMED, (max_pages,), (touched,))
        self._attention, self._max_pages = attention, max_pages
        self._tables = ExtendTables(sizes, device)
        self.batch: ExtendBatch = self._tables.batch
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None  # torch.cuda.graph_pool_handle(), on a GPU
        self.planned = False

    def plan(
        self,
        plan: ExtendPlan,
        passes: list[AttentionPass],
        req_pool_indices: torch.Tensor,
        req_to_token: torch.Tensor,
        slots: SlotMaps,
    ) -> bool:
        """Write a step to the tables, for replays and for calls outside of graphs.

        Returns:
            Whether it fits; otherwise nothing was done.
        """
        self.planned = bool(self._graphs) and self._fits(plan, passes)
        if self.planned:
            fills = [passes[0].fills]
            self._tables.update(plan, fills, req_pool_indices, req_to_token, slots)
            self._attention.plan_replay(passes[0])
        return self.planned

    def _fits(self, plan: ExtendPlan, passes: list[AttentionPass]) -> bool:
        (first, *more) = passes
        return (
            not more
            and first.kv_indices is None
            and first.q_end <= MAX_TOKENS
            and len(plan.requests) <= MAX_REQUESTS
            and self._tables.sizes.hold(ExtendSizes.of(plan, [first.fills]))
        )

    def plan_capture(self, num_tokens: int) -> tuple[AttentionPass, ExtendBatch]:
        """Prepare the launches of a step of up to `num_tokens` tokens."""
        self._attention.plan_capture(MAX_REQUESTS, num_tokens, self._max_pages * PAGE_SIZE)
        nothing = np.zeros(0, np.int32)
        fills = FillPlan(nothing, nothing, nothing, nothing)
        one_pass = AttentionPass(
            fills, 0, num_tokens, nothing, nothing, None, None, causal=True, merges=False
        )
        return one_pass, self.batch.first_touched(_max_touched(num_tokens))

    def capture(self, key: Hashable, launch: Callable[[], object]) -> None:
        """Record what `launch` starts; nothing runs."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            launch()
        finally:
            graph.capture_end()
        self._graphs[key] = graph

    def replay(self, key: Hashable) -> bool:
        """Run a recorded layer on the planned step.

        Returns:
            False if the step does not fit, or nothing was recorded for this key.
        """
        graph = self._graphs.get(key) if self.planned else None
        if graph is None:
            return False
        graph.replay()
        return True
