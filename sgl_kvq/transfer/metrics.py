"""Prometheus metrics of PD transfer; SGLang's /metrics shows them with `--enable-metrics`."""

from __future__ import annotations

from functools import cache
from typing import Any


class TransferMetrics:
    """Counters of one process. `side` is prefill or decode.

    SGLang must have set up Prometheus for several processes before this is made, which is why
    prometheus_client is imported here.
    """

    def __init__(self, side: str) -> None:
        counters, seconds = _collectors()
        self.wire_bytes = {
            kind: counters["kvq_transfer_wire_bytes_total"].labels(side, kind)
            for kind in ("pages", "open_rows", "sink_rows", "metadata", "header")
        }
        self.closed_page_tokens = counters["kvq_transfer_closed_page_tokens_total"].labels(side)
        self.blocks = counters["kvq_transfer_blocks_total"].labels(side)
        self.retries = counters["kvq_transfer_retries_total"].labels(side)
        self.checksum_failures = counters["kvq_transfer_checksum_failures_total"].labels(side)
        self.refused_blocks = counters["kvq_transfer_refused_blocks_total"].labels(side)
        self._transfers = counters["kvq_transfer_transfers_total"]
        self._seconds = seconds
        self._side = side

    def finished(self, result: str) -> None:
        """Count a transfer that ended: "success" or "failed"."""
        self._transfers.labels(self._side, result).inc()

    def observe(self, state: str, duration_s: float) -> None:
        """Add the seconds a transfer spent in a state of SGLang's `KVPoll`."""
        self._seconds.labels(self._side, state).observe(duration_s)


@cache
def _collectors() -> tuple[dict[str, Any], Any]:
    from prometheus_client import Counter, Histogram

    rows = (
        ("kvq_transfer_wire_bytes_total", "Bytes of blocks on the wire", ("side", "kind")),
        ("kvq_transfer_closed_page_tokens_total", "Tokens of closed pages, by rank", ("side",)),
        ("kvq_transfer_blocks_total", "Blocks sent or committed", ("side",)),
        ("kvq_transfer_retries_total", "Blocks sent again", ("side",)),
        ("kvq_transfer_checksum_failures_total", "Blocks whose checksum did not hold", ("side",)),
        ("kvq_transfer_refused_blocks_total", "Blocks that fit no transfer", ("side",)),
        ("kvq_transfer_transfers_total", "Transfers that ended", ("side", "result")),
    )
    counters = {name: Counter(name, text, labels) for name, text, labels in rows}
    buckets = (0.001, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
    seconds = Histogram(
        "kvq_transfer_state_seconds", "Time in each state", ("side", "state"), buckets=buckets
    )
    return counters, seconds
