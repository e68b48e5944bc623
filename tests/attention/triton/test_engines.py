"""The GPU engine, interpreted or compiled, against the CPU engine on the same steps."""

from __future__ import annotations

import pytest
import torch
import triton

from sgl_kvq.attention import gpu
from sgl_kvq.attention.cpu import CpuEngine
from sgl_kvq.attention.layer import LayerSpec
from sgl_kvq.attention.warm_up import warm_up
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.memory_pool.storage import PagedCache
from tests.attention.test_engine_cpu import STEPS, TOTALS
from tests.support.attention import relative_error
from tests.support.growing_requests import NUM_LAYERS, GrowingRequests, make_layers, make_store
from tests.support.torch_attention import TorchAttention


def start(name: str, quantized: bool, device: str) -> tuple[GrowingRequests, gpu.GpuEngine]:
    store = make_store(name, device)
    requests = GrowingRequests(store, TOTALS, seed=len(name))
    layers, tokens = make_layers(store), requests.req_to_token
    return requests, gpu.GpuEngine(store, layers, tokens, quantized, TorchAttention)


def assert_same_storage(ours: GrowingRequests, other: GrowingRequests) -> None:
    """Closed pages, sink rows and rows of open pages are equal, wherever somebody may read them."""

    def written(requests: GrowingRequests, cache: PagedCache) -> list[torch.Tensor]:
        parts = []
        for own, n in zip(requests.pages, requests.lens, strict=True):
            parts.append(cache.pages[own[: n // PAGE_SIZE]])
            if n >= PAGE_SIZE:
                parts.append(cache.sink_rows[requests.store.sink_pages.held_slot(own[:1])])
            slot = requests.store.open_slots.held_slot(own[[(n - 1) // PAGE_SIZE]])
            assert (int(slot) > 0) == (n % PAGE_SIZE > 0)
            parts.append(cache.open_rows[slot, :, : n % PAGE_SIZE])
        return parts

    for caches in zip(ours.store.layers, other.store.layers, strict=True):
        for mine, theirs in zip(written(ours, caches[0]), written(other, caches[1]), strict=True):
            assert torch.equal(mine.cpu(), theirs.cpu())


@pytest.mark.parametrize(
    ("name", "quantized"),
    [
        ("hack2", False),
        ("hack2", True),
        pytest.param("saw4", True, marks=pytest.mark.long),
        pytest.param("bf16", False, marks=pytest.mark.long),
    ],
)
def test_same_bytes_and_outputs(name: str, quantized: bool, device: str) -> None:
    store = make_store(name)
    expected = GrowingRequests(store, TOTALS, seed=len(name))
    reference = CpuEngine(store, make_layers(store), expected.req_to_token, quantized)
    requests, engine = start(name, quantized, device)
    for step in STEPS:
        outs = zip(expected.step(reference, *step), requests.step(engine, *step), strict=True)
        for wanted, found in outs:
            # bfloat16, truncated by the interpreter
            assert relative_error(found.cpu(), wanted) < 1e-2
    assert_same_storage(requests, expected)


class GraphedEngine:
    """Decodes by replaying one CUDA graph a layer, captured in its first step, as SGLang does."""

    def __init__(self, engine: gpu.GpuEngine) -> None:
        self.engine = engine
        self.reserve, self.plan, self.extend = engine.reserve, engine.plan, engine.extend
        self.captured: dict[int, tuple[torch.cuda.CUDAGraph, list[torch.Tensor], torch.Tensor]] = {}

    def decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: LayerSpec
    ) -> torch.Tensor:
        if layer.layer_id not in self.captured:
            graph, inputs = torch.cuda.CUDAGraph(), [x.clone() for x in (q, k, v)]
            with torch.cuda.graph(graph):
                out = self.engine.decode(*inputs, layer)
            self.captured[layer.layer_id] = (graph, inputs, out)
        graph, inputs, out = self.captured[layer.layer_id]
        for target, source in zip(inputs, (q, k, v), strict=True):
            target.copy_(source)
        graph.replay()
        return out.clone()


@pytest.mark.gpu
def test_a_graph_reads_what_plan_prepared_last(gpu: str) -> None:
    """The pages that a replay reads, fills and closes are those of its own step."""
    (eager, engine), (requests, other) = (start("hack2", False, gpu) for _ in range(2))
    graphed = GraphedEngine(other)
    for step in STEPS:
        outs = zip(eager.step(engine, *step), requests.step(graphed, *step), strict=True)
        assert all(torch.equal(wanted, found) for wanted, found in outs)
    assert len(graphed.captured) == NUM_LAYERS
    assert_same_storage(requests, eager)


def test_warm_up_leaves_nothing_behind(device: str) -> None:
    """Requests after it get the bytes and outputs that they get without it."""
    (cold, engine), (requests, warmed) = (start("hack2", False, device) for _ in range(2))
    tokens = requests.req_to_token.clone()
    requests.req_to_token.zero_()
    warm_up(warmed, make_layers(requests.store), len(tokens), tokens.shape[1], device)
    requests.req_to_token.copy_(tokens)
    for step in STEPS[:2]:
        outs = zip(cold.step(engine, *step), requests.step(warmed, *step), strict=True)
        assert all(torch.equal(wanted, found) for wanted, found in outs)
    assert_same_storage(requests, cold)


@pytest.mark.gpu
def test_nothing_is_compiled_after_warm_up(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    requests, engine = start("kvq2", False, gpu)
    tokens = requests.req_to_token.clone()
    requests.req_to_token.zero_()
    warm_up(engine, make_layers(requests.store), len(tokens), tokens.shape[1], gpu)
    requests.req_to_token.copy_(tokens)
    monkeypatch.setattr(
        triton.knobs.runtime,
        "jit_post_compile_hook",
        lambda **event: compiled.append(event["repr"]),
    )
    for step in STEPS:
        requests.step(engine, *step)
    assert compiled == []
