"""Two ranks under a random load with aborts and retraction: their pools never part."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import xxhash

from tests.support.random_load import OPTIONS, RandomLoad
from tests.support.ranks import run_ranks
from tests.support.scheduler import SchedulerHarness

LOAD_S = float(os.environ.get("KVQ_LOAD_S", "20"))
REQUESTS_A_CHECK = 10
MIN_REQUESTS = 120  # until the pool was full and requests were retracted, on a slow machine, too

pytestmark = [
    pytest.mark.long,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs"),
    pytest.mark.timeout(LOAD_S + 900),
]


@pytest.mark.parametrize("name", ["hack2", "kvq2"])
def test_free_lists_stay_equal_and_nothing_is_held(
    name: str, tiny_model_path: str, text_ids: list[int]
) -> None:
    """`KVQ_LOAD_S` sets the duration."""
    ranks = run_ranks(2, serve_load, tiny_model_path, name, text_ids)
    for rank in ranks:
        print(f"{name}: {rank}")
        assert rank["lowest_free"] <= 2 * 64  # the pool really was full
        assert rank["retracted"] > 0
        assert rank["aborted"] > 0
        assert rank["held"] == (0, 0, 0, 0)
    assert ranks[0]["checks"] == ranks[1]["checks"] > 0


def serve_load(
    rank: int, tp: dict[str, Any], model_path: str, name: str, text_ids: list[int]
) -> dict[str, Any]:
    """Serve random requests for `LOAD_S` seconds of rank 0; what this rank saw."""
    harness = SchedulerHarness(model_path, tp_rank=rank, kv_quant=name, **OPTIONS, **tp)
    pool, allocator, tree = harness.pool, harness.allocator, harness.scheduler.tree_cache
    load = RandomLoad(harness, text_ids)
    began, checks, gone_s = time.monotonic(), 0, 0.0
    while gone_s < LOAD_S or load.number < MIN_REQUESTS:  # the first rank's time: all end at once
        for _ in range(REQUESTS_A_CHECK):
            load.next_request()
        seen = exchange(harness, (digest_of(harness), time.monotonic() - began))
        assert len({digest for digest, _ in seen}) == 1, f"differ after {load.number} requests"
        checks, gone_s = checks + 1, seen[0][1]
    load.finish()
    leaked = pool.plan.num_tokens - allocator.available_size() - tree.evictable_size()
    held = (pool.open_slots.num_used(), leaked, tree.protected_size())
    harness.flush()
    return {
        "requests": load.number,
        "checks": checks,
        "lowest_free": load.lowest_free,
        "retracted": sum(req.retraction_count for req in harness._requests.values()),
        "aborted": load.aborted,
        "held": (*held, pool.sink_pages.num_used()),
    }


def digest_of(harness: SchedulerHarness) -> str:
    """Free pages in their order, the page of each open slot and of each row with sink rows."""
    pool, allocator = harness.pool, harness.allocator
    pages = torch.arange(pool.plan.num_rows + 1, device=allocator.free_pages.device)
    parts = (
        allocator.free_pages,
        allocator.release_pages,
        pool.open_slots.held_slot(pages),
        pool.sink_pages.held_slot(pages),
    )
    lengths = torch.tensor([len(part) for part in parts])
    numbers = torch.cat([lengths, *(part.cpu() for part in parts)])
    return xxhash.xxh3_64_hexdigest(numbers.numpy().tobytes())


def exchange(harness: SchedulerHarness, mine: Any) -> list[Any]:
    """What each rank says, by rank."""
    group = harness.scheduler.tp_cpu_group
    seen: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(seen, mine, group)
    return seen
