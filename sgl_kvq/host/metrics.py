"""Gauges of the quantized pool, in SGLang's own `/metrics`.

They are set whenever SGLang sets its own (each prefill batch, every `--decode-log-interval` decode
steps, on becoming idle), and when the cache is flushed. What only the device knows is copied
without waiting for it; on a GPU a thread sets those gauges once the copy has arrived.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.memory_pool.store import PagedStore

PREFIX = "sgl_kvq:"
GAUGES = {
    "closed_pages": "Pages stored as codes, cached ones included.",
    "open_pages": "Pages in 16 bits that a request still writes; each takes an open slot.",
    "free_pages": "Pages nobody holds.",
    "tokens_held": "Tokens that the held pages have room for, cached ones included.",
    "bytes_per_token": "Bytes of a token in a closed page, all layers of this rank.",
    "pool_bytes": "Bytes of the KV pool of this rank, open pages and sink rows included.",
    "open_slots": "Open pages that there is room for.",
    "sink_pages": "Page rows that hold the sink rows of first pages.",
}
NONFINITE = "nonfinite_elements"
"""Counter of K and V elements that were not finite or too large, and were replaced."""


class PoolMetrics:
    """The metrics of one scheduler process.

    Args:
        allocator: SGLang's allocator over a quantized pool.
        labels: Those of SGLang's own metrics; the format's name is added.
    """

    def __init__(self, allocator: Any, labels: dict[str, Any]) -> None:
        # Only now: prometheus_client reads SGLang's PROMETHEUS_MULTIPROC_DIR when it is imported.
        from prometheus_client import Counter, Gauge

        self._allocator = allocator
        self._pool: PagedStore = allocator.store
        labels = {**labels, "format": self._pool.layout.format.name}
        self._gauges = {
            name: Gauge(
                PREFIX + name, documentation, list(labels), multiprocess_mode="mostrecent"
            ).labels(**labels)
            for name, documentation in GAUGES.items()
        }
        self._nonfinite = Counter(
            PREFIX + NONFINITE,
            "Elements of K and V not finite or too large, replaced.",
            list(labels),
        ).labels(**labels)
        self._num_nonfinite = 0
        self._reader = ThreadPoolExecutor(1, "sgl_kvq-metrics")
        self._set_constants()

    def log(self) -> None:
        """Set all metrics; on a GPU some of them a moment later."""
        pool = self._pool
        num_held = (pool.plan.num_tokens - self._allocator.available_size()) // PAGE_SIZE
        counts = torch.stack(
            [pool.open_slots.count_used(), pool.sink_pages.count_used(), pool.num_nonfinite]
        )
        if not counts.is_cuda:
            self._set(num_held, counts)
            return
        on_host = counts.to("cpu", non_blocking=True)
        copied = torch.cuda.Event(blocking=True)
        copied.record()
        self._reader.submit(self._set, num_held, on_host, copied)

    def _set_constants(self) -> None:
        plan = self._pool.plan
        self._gauges["bytes_per_token"].set(plan.bytes_per_token)
        self._gauges["pool_bytes"].set(plan.total_bytes)
        self._gauges["open_slots"].set(plan.open_slots)

    def _set(
        self, num_held: int, counts: torch.Tensor, copied: torch.cuda.Event | None = None
    ) -> None:
        """Set what changes.

        Args:
            num_held: Pages that are not free.
            counts: int64 [3] on the host: open slots used, sink pages, elements not finite.
            copied: Wait for it before reading `counts`.
        """
        if copied is not None:
            copied.synchronize()
        num_open, num_sinks, num_nonfinite = counts.tolist()
        self._gauges["closed_pages"].set(max(0, num_held - num_open))
        self._gauges["open_pages"].set(num_open)
        self._gauges["free_pages"].set(self._pool.plan.num_pages - num_held)
        self._gauges["tokens_held"].set(num_held * PAGE_SIZE)
        self._gauges["sink_pages"].set(num_sinks)
        self._nonfinite.inc(num_nonfinite - self._num_nonfinite)
        self._num_nonfinite = num_nonfinite
