"""Prometheus metrics of PD transfer; SGLang's /metrics shows them with `--enable-metrics`."""

from __future__ import annotations

from functools import cache
from typing import Any

from sgl_kvq.transfer.wire import BlockKind


class TransferMetrics:
    """Counters of one process. `side` is prefill or decode.

    SGLang must have set up Prometheus for several processes before this is made, which is why
    prometheus_client is imported here.
    """

    def __init__(self, side: str) -> None:
        counters, seconds = _collectors()
        self.wire_bytes = {
            kind: counters["sgl_kvq:transfer_wire_bytes_total"].labels(side, kind.name.lower())
            for kind in BlockKind
        }
        self.header_bytes = counters["sgl_kvq:transfer_wire_bytes_total"].labels(side, "header")
        self.closed_page_tokens = counters["sgl_kvq:transfer_closed_page_tokens_total"].labels(side)
        self.blocks = counters["sgl_kvq:transfer_blocks_total"].labels(side)
        self.retries = counters["sgl_kvq:transfer_retries_total"].labels(side)
        self.checksum_failures = counters["sgl_kvq:transfer_checksum_failures_total"].labels(side)
        self.refused_blocks = counters["sgl_kvq:transfer_refused_blocks_total"].labels(side)
        self._transfers = counters["sgl_kvq:transfer_transfers_total"]
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
        ("sgl_kvq:transfer_wire_bytes_total", "Bytes of blocks on the wire", ("side", "kind")),
        ("sgl_kvq:transfer_closed_page_tokens_total", "Tokens of closed pages, by rank", ("side",)),
        ("sgl_kvq:transfer_blocks_total", "Blocks sent or committed", ("side",)),
        ("sgl_kvq:transfer_retries_total", "Blocks sent again", ("side",)),
        (
            "sgl_kvq:transfer_checksum_failures_total",
            "Blocks whose checksum did not hold",
            ("side",),
        ),
        ("sgl_kvq:transfer_refused_blocks_total", "Blocks that fit no transfer", ("side",)),
        ("sgl_kvq:transfer_transfers_total", "Transfers that ended", ("side", "result")),
    )
    counters = {name: Counter(name, text, labels) for name, text, labels in rows}
    buckets = (0.001, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
    seconds = Histogram(
        "sgl_kvq:transfer_state_seconds", "Time in each state", ("side", "state"), buckets=buckets
    )
    return counters, seconds
