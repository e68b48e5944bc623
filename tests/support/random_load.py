"""Random requests, aborts and retractions on a pool that is too small."""

from __future__ import annotations

import random

from tests.support.scheduler import SchedulerHarness

PAGES_OF_POOL = 24
OPTIONS = {
    "kv_quant_memory_gb": 0.05,
    "max_total_tokens": PAGES_OF_POOL * 64,
    "chunked_prefill_size": 256,
    "max_running_requests": 6,
}
"""Of the scheduler."""


class RandomLoad:
    """The same load on every scheduler: what happens follows from the number of the request.

    Args:
        harness: A scheduler with `OPTIONS`; retracts at times until `finish`.
        text_ids: Tokens that prompts are cut from.

    Attributes:
        number: Requests so far.
        aborted: Of them.
        lowest_free: Fewest tokens that the pool had free.
    """

    def __init__(self, harness: SchedulerHarness, text_ids: list[int]) -> None:
        from sglang.srt.managers import scheduler

        assert harness.pool.plan.num_pages == PAGES_OF_POOL
        self._harness, self._text_ids, self._switches = harness, text_ids, scheduler
        self._random = random.Random(0)
        self._alive: list[str] = []
        self.number = self.aborted = 0
        self.lowest_free = harness.pool.plan.num_tokens
        scheduler.TEST_RETRACT_INTERVAL = 7

    def next_request(self) -> None:
        """Send a request, perhaps abort one, and run a few steps."""
        rng, harness = self._random, self._harness
        family = rng.randrange(8) * 500
        length = rng.choice([1, 5, 63, 64, 65, 100, 128, 200, 300, 450])
        prompt = self._text_ids[family : family + rng.randrange(1, length + 1)]
        prompt += rng.choices(range(100, 40_000), k=rng.choice([0, 0, 1, 7, 70]))
        self._alive.append(harness.submit(prompt, rng.choice([1, 2, 20, 63, 64, 65, 150])))
        if rng.random() < 0.2:
            harness.abort(self._alive.pop(rng.randrange(len(self._alive))))
            self.aborted += 1
        self._switches.TEST_RETRACT = self.number % 50 > 40
        for _ in range(rng.randrange(0, 12)):
            harness.step()
            self.lowest_free = min(self.lowest_free, harness.allocator.available_size())
        self.number += 1

    def finish(self) -> None:
        """Run to the end, which is SGLang's own idle check: it raises on a leak."""
        self._switches.TEST_RETRACT = False
        self._harness.run()
