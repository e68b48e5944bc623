"""The GPU engine, interpreted or compiled, against the CPU engine on the same steps."""

from __future__ import annotations

import pytest
import torch

from sgl_kvq.attention import gpu
from sgl_kvq.attention.cpu import CpuEngine
from sgl_kvq.formats.base import PAGE_SIZE
from tests.attention.test_engine_cpu import STEPS, TOTALS
from tests.support.attention import relative_error
from tests.support.growing_requests import GrowingRequests, make_layers, make_store
from tests.support.torch_attention import TorchAttention


@pytest.mark.parametrize(
    ("name", "quantized"),
    [
        ("hack2", False),
        ("hack2", True),
        pytest.param("saw4", True, marks=pytest.mark.long),
        pytest.param("bf16", False, marks=pytest.mark.long),
    ],
)
def test_same_bytes_and_outputs(
    name: str, quantized: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device != "cpu":
        pytest.skip("the stores of both engines lie in main memory; tests/serving/test_gpu.py")
    monkeypatch.setattr(gpu, "FlashInferAttention", lambda *args: TorchAttention(args[4]))
    stores = [make_store(name) for _ in range(2)]
    requests = [GrowingRequests(store, TOTALS, seed=len(name)) for store in stores]
    engines = [
        engine(store, make_layers(store), own.req_to_token, quantized)
        for engine, store, own in zip((CpuEngine, gpu.GpuEngine), stores, requests, strict=True)
    ]
    for ids, chunks, decode in STEPS:
        outs = [
            own.step(engine, ids, chunks, decode)
            for own, engine in zip(requests, engines, strict=True)
        ]
        for ours, other in zip(*outs, strict=True):
            assert relative_error(other, ours) < 1e-2  # bfloat16, truncated by the interpreter
    closed = torch.cat(
        [own[: n // PAGE_SIZE] for own, n in zip(requests[0].pages, requests[0].lens, strict=True)]
    )
    for ours, other in zip(*(store.layers for store in stores), strict=True):
        assert torch.equal(ours.pages[closed], other.pages[closed])
        assert torch.equal(ours.sink_rows[1:].isnan(), other.sink_rows[1:].isnan())
        assert torch.equal(ours.sink_rows[1:].nan_to_num(), other.sink_rows[1:].nan_to_num())
    for own, n in zip(requests[0].pages, requests[0].lens, strict=True):
        slot = int(stores[0].open_slots.held_slot(own[[(n - 1) // PAGE_SIZE]]))
        assert slot > 0 if n % PAGE_SIZE else slot == 0
        if slot:
            rows = [store.layers[1].open_rows[slot, :, : n % PAGE_SIZE] for store in stores]
            assert torch.equal(*rows)
