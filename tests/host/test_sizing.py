"""Pools take the bytes they were given, whatever else is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

MEMORY_GB = 0.01


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_running_requests": 3},
        {"max_total_tokens": 2560},
        {"disaggregation_decode_extra_slots": 40},
        {"disaggregation_decode_extra_slots": 40, "max_running_requests": 3},
    ],
    ids=lambda options: " ".join(options) or "defaults",
)
def test_a_pool_fits_its_memory(
    options: dict[str, Any], start_scheduler: Callable[..., Any], tiny_model_path: str
) -> None:
    """Open pages of requests that are still arriving at a decode instance included."""
    if "disaggregation_decode_extra_slots" in options:
        options = {
            **options,
            "disaggregation_mode": "decode",
            "disaggregation_transfer_backend": "kvq-zmq",
        }
    harness = start_scheduler(
        tiny_model_path, kv_quant="hack2", kv_quant_memory_gb=MEMORY_GB, **options
    )
    plan = harness.pool.plan
    budget = MEMORY_GB * 2**30
    assert plan.total_bytes <= budget
    if "max_total_tokens" not in options:
        assert plan.total_bytes > 0.98 * budget
    rows = harness.scheduler.req_to_token_pool
    assert plan.open_slots == rows.size + getattr(rows, "pre_alloc_size", 0)
    assert rows.size <= plan.num_pages
    assert harness.scheduler.max_running_requests == options.get("max_running_requests", rows.size)
