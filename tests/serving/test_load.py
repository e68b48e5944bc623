"""No page, slot or request is lost under a random load on a pool that is too small."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

PAGES_OF_POOL = 24


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

    harness = start_scheduler(
        tiny_model_path,
        kv_quant=name,
        kv_quant_memory_gb=0.05,
        max_total_tokens=PAGES_OF_POOL * 64,
        chunked_prefill_size=256,
        max_running_requests=6,
    )
    pool, allocator, tree = harness.pool, harness.allocator, harness.scheduler.tree_cache
    assert pool.plan.num_pages == PAGES_OF_POOL
    monkeypatch.setattr(scheduler_module, "TEST_RETRACT_INTERVAL", 7)
    rng = random.Random(0)
    alive: list[str] = []
    lowest_free = pool.plan.num_tokens
    for number in range(num_requests):
        family = rng.randrange(8) * 500
        length = rng.choice([1, 5, 63, 64, 65, 100, 128, 200, 300, 450])
        prompt = text_ids[family : family + rng.randrange(1, length + 1)]
        prompt += rng.choices(range(100, 40_000), k=rng.choice([0, 0, 1, 7, 70]))
        alive.append(harness.submit(prompt, rng.choice([1, 2, 20, 63, 64, 65, 150])))
        if rng.random() < 0.2:
            harness.abort(alive.pop(rng.randrange(len(alive))))
        monkeypatch.setattr(scheduler_module, "TEST_RETRACT", number % 50 > 40)
        for _ in range(rng.randrange(0, 12)):
            harness.step()
            lowest_free = min(lowest_free, allocator.available_size())
    monkeypatch.setattr(scheduler_module, "TEST_RETRACT", False)
    harness.run()  # ends with SGLang's own idle check, which raises on a leak

    assert lowest_free <= 2 * 64  # the pool really was full
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
