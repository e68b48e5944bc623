"""Prometheus metrics of PD transfer; SGLang's /metrics shows them with `--enable-metrics`."""

from __future__ import annotations

from functools import cache
from typing import Any

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.transfer.protocol.header import HEADER_BYTES, BlockKind


class TransferMetrics:
    """Counters of one process. `side` is prefill or decode.

    Blocks are counted in plain integers, which `flush` adds to the counters: with several processes
    each counter is a file. SGLang must have set up Prometheus for several processes before this is
    made, which is why prometheus_client is imported here.
    """

    def __init__(self, side: str) -> None:
        counters, seconds = _collectors()
        self._wire_bytes = {
            kind: counters["sgl_kvq:transfer_wire_bytes_total"].labels(side, kind.name.lower())
            for kind in BlockKind
        }
        self._header_bytes = counters["sgl_kvq:transfer_wire_bytes_total"].labels(side, "header")
        self._tokens = counters["sgl_kvq:transfer_closed_page_tokens_total"].labels(side)
        self._blocks = counters["sgl_kvq:transfer_blocks_total"].labels(side)
        self.early_bytes = counters["sgl_kvq:transfer_early_bytes_total"].labels(side)
        self.retries = counters["sgl_kvq:transfer_retries_total"].labels(side)
        self.checksum_failures = counters["sgl_kvq:transfer_checksum_failures_total"].labels(side)
        self.refused = counters["sgl_kvq:transfer_refused_messages_total"].labels(side)
        self._transfers = counters["sgl_kvq:transfer_transfers_total"]
        self._seconds = seconds
        self._side = side
        self._counted = [(0, 0)] * len(BlockKind)
        self._closed_page_tokens = 0.0

    def count_block(
        self, kind: BlockKind, wire_bytes: int, page_parts: int, parts_of_a_page: int
    ) -> None:
        """Count a block that left or was committed.

        Args:
            kind: What the block holds.
            wire_bytes: Payload as sent.
            page_parts: Closed pages times layers times heads in it.
            parts_of_a_page: Layers times heads of this rank.
        """
        blocks, total_bytes = self._counted[kind]
        self._counted[kind] = (blocks + 1, total_bytes + wire_bytes)
        self._closed_page_tokens += PAGE_SIZE * page_parts / parts_of_a_page

    def flush(self) -> None:
        """Add what was counted since the last call."""
        for kind, (blocks, total_bytes) in zip(BlockKind, self._counted, strict=True):
            if blocks:
                self._blocks.inc(blocks)
                self._wire_bytes[kind].inc(total_bytes)
                self._header_bytes.inc(blocks * HEADER_BYTES)
        self._counted = [(0, 0)] * len(BlockKind)
        if self._closed_page_tokens:
            self._tokens.inc(self._closed_page_tokens)
            self._closed_page_tokens = 0.0

    def finished(self, result: str) -> None:
        """Count a transfer that ended: "success" or "failed"."""
        self.flush()
        self._transfers.labels(self._side, result).inc()

    def observe(self, state: str, duration_s: float) -> None:
        """Add the seconds a transfer spent in a state of SGLang's `KVPoll`."""
        self._seconds.labels(self._side, state).observe(duration_s)


@cache
def _collectors() -> tuple[dict[str, Any], Any]:
    from prometheus_client import Counter, Histogram

    rows = (
        ("sgl_kvq:transfer_wire_bytes_total", "Bytes of blocks on the wire", ("side", "kind")),
        ("sgl_kvq:transfer_closed_page_tokens_total", "Tokens of closed pages, by rank", ("side",)),
        ("sgl_kvq:transfer_blocks_total", "Blocks sent or committed", ("side",)),
        ("sgl_kvq:transfer_early_bytes_total", "Bytes that landed while prefill ran", ("side",)),
        ("sgl_kvq:transfer_retries_total", "Blocks sent again", ("side",)),
        (
            "sgl_kvq:transfer_checksum_failures_total",
            "Blocks whose checksum did not hold",
            ("side",),
        ),
        ("sgl_kvq:transfer_refused_messages_total", "Messages that were refused", ("side",)),
        ("sgl_kvq:transfer_transfers_total", "Transfers that ended", ("side", "result")),
    )
    counters = {name: Counter(name, text, labels) for name, text, labels in rows}
    buckets = (0.001, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
    seconds = Histogram(
        "sgl_kvq:transfer_state_seconds", "Time in each state", ("side", "state"), buckets=buckets
    )
    return counters, seconds
