"""Ways in which quantized caches of other systems returned wrong text without an error.

Each case serves requests twice, once so that nothing of the kind can happen (alone, on an idle
server) and once under the condition that broke others, and compares log-probabilities. The model is
the real one's first three layers. On a CPU it runs in float64, where a page read or written
wrongly is the only thing that can make a difference (see `test_invariance`). On a GPU it runs in
bfloat16 and differences are those of rounding; `test_a_damaged_page_is_noticed` shows for both that
one wrong page is far outside of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.support.compare import logprob_differences

GPU_FORMATS = ("bf16", "hack2", "hack4", "kvq2")
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 10},
        "color": {"enum": ["red", "green", "blue", "white", "black"]},
        "counts": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 99},
            "minItems": 8,
            "maxItems": 8,
        },
    },
    "required": ["city", "color", "counts"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Served:
    """A scheduler with the short model, and how far apart two of its answers may be.

    Attributes:
        harness: The scheduler.
        max_difference: Of two log-probabilities of one token; where the two best tokens are closer
            than that, texts may part.
        mean_difference: On average.
    """

    harness: Any
    max_difference: float
    mean_difference: float

    def assert_same(self, results: list[Any], expected: list[Any]) -> None:
        found = logprob_differences(results, expected, self.max_difference)
        print(f"difference: mean {found.mean():.2e}, largest {found.max():.2e}, of {len(found)}")
        assert found.max() < self.max_difference
        assert found.mean() < self.mean_difference

    def one_by_one(self, prompts: list[list[int]], new_tokens: int, **more: Any) -> list[Any]:
        """Serve each prompt alone, with an empty cache."""
        results = []
        for prompt in prompts:
            self.harness.flush()
            results += self.harness.generate([prompt], new_tokens, **more)
        self.harness.flush()
        return results


@pytest.fixture(params=GPU_FORMATS)
def serve(
    request: pytest.FixtureRequest,
    short_model_path: str,
    start_scheduler: Callable[..., Any],
) -> Callable[..., Served]:
    """Start a scheduler with a pool of some pages."""
    name = request.param
    on_gpu = torch.cuda.is_available()
    if not on_gpu and name != "hack2":
        pytest.skip("needs a GPU: the pages of all formats pass through the same PyTorch code")

    def start(num_pages: int, max_running: int, grammars: bool = False) -> Served:
        harness = start_scheduler(
            short_model_path,
            kv_quant=name,
            kv_quant_prefill="quantized",
            kv_quant_memory_gb=0.2,
            max_total_tokens=num_pages * 64,
            max_running_requests=max_running,
            chunked_prefill_size=256,
            constrained_json_disable_any_whitespace=True,
            skip_tokenizer_init=not grammars,
            schedule_conservativeness=0.05,  # fill the pool: requests may have to be retracted
            **({"enable_fp32_lm_head": True} if on_gpu else {"dtype": "float32"}),
        )
        assert harness.pool.plan.num_pages == num_pages
        if on_gpu:
            return Served(harness, 1.0, 0.1)
        harness.scheduler.tp_worker.model_runner.model.double()
        return Served(harness, 1e-4, 1e-5)

    return start


def assert_nothing_held(harness: Any) -> None:
    pool, allocator, tree = harness.pool, harness.allocator, harness.scheduler.tree_cache
    assert pool.open_slots.num_used() == 0
    assert tree.protected_size() == 0
    assert allocator.available_size() + tree.evictable_size() == pool.plan.num_tokens
    assert int(pool.num_nonfinite) == 0


def test_json_from_a_full_pool(
    serve: Callable[..., Served],
    model_path: str,
    text_ids: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prefix hits while the pool is full and pages change hands; every answer is the idle one."""
    served = serve(num_pages=8, max_running=8, grammars=True)
    harness = served.harness
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    prompts = []
    for number in range(5):
        record = f"\n\nRecord {number}: {7919 * number} black boxes for Oslo. The record as JSON: "
        tail = tokenizer(record)["input_ids"]
        prompts.append(text_ids[: 250 - len(tail)] + tail)  # soon in need of a fifth page
    schema = json.dumps(SCHEMA)
    alone = served.one_by_one(prompts, 100, json_schema=schema)

    order = [*range(5), *range(5)]
    random.Random(0).shuffle(order)
    rids = [harness.submit(prompts[i], 100, json_schema=schema) for i in order]
    free = []
    alloc_decode = harness.allocator.alloc_decode

    def watched(*args: Any) -> Any:
        pages = alloc_decode(*args)
        free.append(harness.allocator.available_size())
        return pages

    monkeypatch.setattr(harness.allocator, "alloc_decode", watched)
    harness.run()
    results = [harness.result(rid) for rid in rids]
    print(f"least free: {min(free)}, answers of {sorted(len(r.output_ids) for r in results)}")
    assert min(free) == 0
    assert sum(result.cached_tokens for result in results) > 5 * 128
    served.assert_same(results, [alone[i] for i in order])
    for result in (*alone, *results):
        assert result.finish_reason == "FINISH_MATCHED_TOKEN"
        answer = json.loads(tokenizer.decode(result.output_ids, skip_special_tokens=True))
        assert list(answer) == SCHEMA["required"]
        assert len(answer["counts"]) == 8
        assert answer["color"] in SCHEMA["properties"]["color"]["enum"]
    assert_nothing_held(harness)


@pytest.mark.long
def test_short_queries_on_a_long_cached_prefix(
    serve: Callable[..., Served], text_ids: list[int]
) -> None:
    """A few tokens behind thousands of cached ones: the case in which decode splits its keys."""
    served = serve(num_pages=160, max_running=4)
    harness = served.harness
    prefix = text_ids[:3990]
    prompts = [prefix + text_ids[at : at + n] for at, n in ((5000, 1), (5100, 7), (5200, 63))]
    alone = served.one_by_one(prompts, 40)
    harness.generate([prefix], 1)
    for batch in (prompts[:1], prompts):
        hits = harness.generate(batch, 40)
        assert [result.cached_tokens for result in hits] == [3968, 3968, 3968][: len(batch)]
        served.assert_same(hits, alone[: len(batch)])
    assert_nothing_held(harness)


@pytest.mark.long
def test_later_chunks_of_a_prefill(
    serve: Callable[..., Served], text_ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second chunk reads the first one's pages, also when the chunk ends inside of a batch."""
    served = serve(num_pages=160, max_running=4)
    harness = served.harness
    prompts = [text_ids[:1500], text_ids[2000:2777], text_ids[3000:3064]]
    monkeypatch.setattr(harness.scheduler, "chunked_prefill_size", 8192)
    whole = served.one_by_one(prompts, 12, input_logprobs=True)
    for chunk in (64, 512):
        monkeypatch.setattr(harness.scheduler, "chunked_prefill_size", chunk)
        harness.flush()
        before = harness.scheduler.forward_ct
        results = harness.generate(prompts, 12, input_logprobs=True)
        assert harness.scheduler.forward_ct - before >= sum(map(len, prompts)) // chunk
        served.assert_same(results, whole)
        for result, expected in zip(results, whole, strict=True):
            last = [x.input_logprobs[-100:] for x in (result, expected)]
            assert (torch.tensor(last[0]) - torch.tensor(last[1])).abs().mean() < (
                2 * served.mean_difference
            )
    assert_nothing_held(harness)


@pytest.mark.long
def test_a_storm_of_aborts_and_retractions(
    serve: Callable[..., Served], text_ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that survive it answer as on an idle server, and so do those that come after."""
    from sglang.srt.managers import scheduler as scheduler_module

    served = serve(num_pages=40, max_running=8)
    harness = served.harness
    prompts = [text_ids[i * 400 : i * 400 + n] for i, n in enumerate((450, 333, 64, 120, 65, 1))]
    alone = served.one_by_one(prompts, 70)

    monkeypatch.setattr(scheduler_module, "TEST_RETRACT", True)
    monkeypatch.setattr(scheduler_module, "TEST_RETRACT_INTERVAL", 3)
    rng = random.Random(1)
    survivors: list[tuple[str, int]] = []
    for _ in range(12):
        rids = [(harness.submit(prompt, 70), i) for i, prompt in enumerate(prompts)]
        doomed = rng.sample(range(len(rids)), 3)
        for index, (rid, prompt) in enumerate(rids):
            for _ in range(rng.randrange(6)):
                harness.step()
            if index in doomed:
                harness.abort(rids[doomed[0]][0] if rng.random() < 0.3 else rid)
            else:
                survivors.append((rid, prompt))
    harness.run()
    monkeypatch.setattr(scheduler_module, "TEST_RETRACT", False)
    finished = [
        (result, alone[prompt])
        for result, prompt in ((harness.result(rid), prompt) for rid, prompt in survivors)
        if result.finish_reason == "FINISH_LENGTH"
    ]
    assert len(finished) > 20
    served.assert_same(*(list(column) for column in zip(*finished, strict=True)))
    served.assert_same(harness.generate(prompts, 70), alone)
    assert_nothing_held(harness)


def test_two_requests_that_diverge_inside_a_page(
    serve: Callable[..., Served], text_ids: list[int]
) -> None:
    """They share whole pages only; neither sees the other's rows."""
    served = serve(num_pages=40, max_running=4)
    harness = served.harness
    prompts = [text_ids[:150] + text_ids[at : at + 20] for at in (1000, 2000)]
    alone = served.one_by_one(prompts, 40)
    together = harness.generate(prompts, 40)
    swapped = harness.generate(prompts[::-1], 40)[::-1]
    assert swapped[0].cached_tokens == 128
    for results in (together, swapped):
        served.assert_same(results, alone)
    assert_nothing_held(harness)


def test_a_damaged_page_is_noticed(serve: Callable[..., Served], text_ids: list[int]) -> None:
    """What the comparison of all these tests is worth."""
    served = serve(num_pages=40, max_running=4)
    harness = served.harness
    prompts = [text_ids[:330] + text_ids[at : at + 20] for at in (1000, 2000)]
    alone = served.one_by_one(prompts, 20)
    harness.generate(prompts, 20)
    served.assert_same(harness.generate(prompts, 20), alone)
    layout = harness.pool.layout
    (slot,) = harness.cached()[3 * 64]
    page = slot // 64
    for layer in harness.pool.layers:
        rows = layer.pages.unflatten(1, (layout.num_kv_heads, -1))
        rows[page] = rows[page].roll(1, 0)  # each head gets another's codes
    with pytest.raises(AssertionError):
        served.assert_same(harness.generate(prompts, 20), alone)
