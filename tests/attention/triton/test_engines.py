"""The GPU engine, interpreted or compiled, against the CPU engine on the same steps."""

from __future__ import annotations

import sys

import pytest
import torch
import triton

from sgl_kvq.attention.cpu import CpuEngine
from sgl_kvq.attention.gpu import GpuEngine
from sgl_kvq.attention.layer import LayerSpec
from sgl_kvq.attention.warm_up import warm_up
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.host.flash_attention_3 import HOPPER, FlashAttention3, make_prefill_attention
from sgl_kvq.memory_pool.storage import PagedCache
from tests.attention.test_engine_cpu import STEPS, TOTALS
from tests.support import torch_flash_attention
from tests.support.attention import relative_error
from tests.support.growing_requests import NUM_LAYERS, GrowingRequests, make_layers, make_store
from tests.support.torch_attention import TorchAttention


def start(name: str, quantized: bool, device: str) -> tuple[GrowingRequests, GpuEngine]:
    store = make_store(name, device)
    requests = GrowingRequests(store, TOTALS, seed=len(name))
    layers, tokens = make_layers(store), requests.req_to_token
    return requests, GpuEngine(store, layers, tokens, quantized, TorchAttention)


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
    limit = 2e-2 if name == "saw4" else 1e-2  # bfloat16 that the interpreter truncates, q twice
    for step in STEPS:
        outs = zip(expected.step(reference, *step), requests.step(engine, *step), strict=True)
        for wanted, found in outs:
            assert relative_error(found.cpu(), wanted) < limit
    assert_same_storage(requests, expected)


class GraphedEngine:
    """Decodes by replaying one CUDA graph a layer, captured in its first step, as SGLang does."""

    def __init__(self, engine: GpuEngine) -> None:
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


def test_a_step_that_fits_graphs_may_run_outside(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang runs a step without its graph when padding would double it, as one of one token."""
    if device == "cpu":
        monkeypatch.setitem(sys.modules, "sgl_kernel.flash_attn", torch_flash_attention)
        monkeypatch.setattr(FlashAttention3, "_splits", lambda *args: 1)
    elif torch.cuda.get_device_capability()[0] != HOPPER:
        pytest.skip("needs a Hopper GPU")
    store = make_store("hack2")
    expected = GrowingRequests(store, TOTALS, seed=5)
    reference = CpuEngine(store, make_layers(store), expected.req_to_token, False)
    store = make_store("hack2", device)
    requests = GrowingRequests(store, TOTALS, seed=5)
    layers, tokens = make_layers(store), requests.req_to_token
    engine = GpuEngine(store, layers, tokens, False, FlashAttention3)
    graphs = engine._extend_graphs
    assert graphs is not None
    graphs.plan_capture(16)
    graphs._graphs["a layer elsewhere"] = None  # type: ignore[assignment]
    for step in STEPS:
        outs = zip(expected.step(reference, *step), requests.step(engine, *step), strict=True)
        assert graphs.planned or step[2]
        for wanted, found in outs:
            assert relative_error(found.cpu(), wanted) < 1e-2
    assert_same_storage(requests, expected)


class ExtendInGraphs:
    """Extends by replaying graphs of one layer each, in tensors of a fixed place."""

    def __init__(self, engine: GpuEngine, layers: list[LayerSpec], max_tokens: int) -> None:
        self.engine, self.max_tokens, self.replayed = engine, max_tokens, 0
        self.reserve, self.plan, self.decode = engine.reserve, engine.plan, engine.decode
        self.fixed = {layer.layer_id: self._tensors(layer) for layer in layers}
        with torch.cuda.stream(torch.cuda.Stream()):
            for layer in layers:
                engine.capture_extend(*self.fixed[layer.layer_id][:3], layer, self._out(layer))
        torch.cuda.synchronize()

    def _tensors(self, layer: LayerSpec) -> tuple[torch.Tensor, ...]:
        num_kv_heads, num_heads = layer.layout.num_kv_heads, layer.num_qo_heads
        heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
        return tuple(
            torch.full((self.max_tokens, n, layer.layout.head_dim), torch.nan, device="cuda").to(
                layer.layout.row_dtype
            )
            for n in heads
        )

    def _out(self, layer: LayerSpec) -> torch.Tensor:
        return self.fixed[layer.layer_id][3]

    def extend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: LayerSpec
    ) -> torch.Tensor:
        fixed = self.fixed[layer.layer_id]
        for target, source in zip(fixed, (q, k, v), strict=False):
            target[: len(q)] = source
        rows = [x[: len(q)] for x in fixed]
        self.replayed += self.engine.replay_extend(*rows[:3], layer, rows[3], self.max_tokens)
        return rows[3].clone()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["hack2", "kvq2", "bf16"])
def test_extend_in_graphs_equals_eager(gpu: str, name: str) -> None:
    if torch.cuda.get_device_capability()[0] != HOPPER:
        pytest.skip("needs a Hopper GPU")
    runs = []
    for _ in range(2):
        store = make_store(name, gpu)
        requests = GrowingRequests(store, TOTALS, seed=len(name))
        layers, tokens = make_layers(store), requests.req_to_token
        runs.append((requests, GpuEngine(store, layers, tokens, False, make_prefill_attention)))
    (eager, engine), (requests, other) = runs
    graphed = ExtendInGraphs(other, layers, 192)
    for step in STEPS:
        outs = zip(eager.step(engine, *step), requests.step(graphed, *step), strict=True)
        for wanted, found in outs:
            assert relative_error(found, wanted) < 4e-3  # keys are split in another way
    assert graphed.replayed == NUM_LAYERS * sum(not decode for *_, decode in STEPS)
    assert_same_storage(requests, eager)
