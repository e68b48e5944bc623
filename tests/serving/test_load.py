"""No page, slot or request is lost under a random load on a pool that is too small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.random_load import OPTIONS, RandomLoad


@pytest.mark.parametrize(
    ("name", "num_requests"),
    [
        ("hack2", 120),
        pytest.param("hack2", 300, marks=pytest.mark.long),
        pytest.param("bf16", 300, marks=pytest.mark.long),
    ],
)
def test_random_load_ends_with_everything_free(
    name: str,
    num_requests: int,
    tiny_model_path: str,
    text_ids: list[int],
    start_scheduler: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang.srt.managers import scheduler as scheduler_module

    monkeypatch.setattr(scheduler_module, "TEST_RETRACT_INTERVAL", 7)  # put back when this ends
    harness = start_scheduler(tiny_model_path, kv_quant=name, **OPTIONS)
    pool, allocator, tree = harness.pool, harness.allocator, harness.scheduler.tree_cache
    load = RandomLoad(harness, text_ids)
    for _ in range(num_requests):
        load.next_request()
    load.finish()

    assert load.lowest_free <= 2 * 64  # the pool really was full
    assert allocator.available_size() + tree.evictable_size() == pool.plan.num_tokens
    assert tree.protected_size() == 0
    assert pool.open_slots.num_used() == 0
    assert pool.sink_pages.num_used() == len(harness.cached()[0])
    assert len(harness.scheduler.req_to_token_pool.free_slots) == 6
    harness.flush()
    assert allocator.available_size() == pool.plan.num_tokens
    assert pool.sink_pages.num_used() == 0


@pytest.mark.parametrize("users", [40, pytest.param(400, marks=pytest.mark.long)])
def test_short_conversations_are_bounded_by_bytes_alone(
    tiny_model_path: str, start_scheduler: Callable[..., Any], users: int
) -> None:
    """Every user's second turn finds the first one, in the bytes that 16 bits would need."""
    rows_of_user = 4  # three closed pages of a conversation of 200 tokens, and its sink rows
    harness = start_scheduler(
        tiny_model_path,
        kv_quant="hack2",
        kv_quant_memory_gb=0.5,
        max_total_tokens=rows_of_user * users * 64,
        max_running_requests=2,
    )
    first_turns = [[1000 + user] * 200 for user in range(users)]
    for prompt in first_turns:
        (result,) = harness.generate([prompt], 1)
        assert result.cached_tokens == 0
    hits = [harness.generate([prompt + [7] * 20], 1)[0].cached_tokens for prompt in first_turns]
    assert hits == [192] * users


def test_a_full_cache_makes_room_for_sink_rows(
    tiny_model_path: str, start_scheduler: Callable[..., Any]
) -> None:
    """Sequences of one page need two page rows each; SGLang counts one."""
    harness = start_scheduler(
        tiny_model_path,
        kv_quant="hack2",
        kv_quant_memory_gb=0.05,
        max_total_tokens=20 * 64,
        max_running_requests=2,
    )
    for number in range(30):
        (result,) = harness.generate([[1000 + number] * 70], 60)  # decoding begins a page, too
        assert len(result.output_ids) == 60
    (again,) = harness.generate([[1000 + 29] * 70], 2)
    assert again.cached_tokens == 64
    harness.flush()
    assert harness.allocator.available_size() == 20 * 64
