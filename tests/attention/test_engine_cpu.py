"""The CPU engine against float64 attention over what each query must see."""

from __future__ import annotations

import pytest
import torch

from sgl_kvq.attention.cpu import CpuEngine
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.dequantize import decode_keys, decode_values
from sgl_kvq.kernels.decode.reference import attend
from tests.support.attention import relative_error
from tests.support.growing_requests import (
    HEAD_DIM,
    NUM_LAYERS,
    SINKS,
    GrowingRequests,
    make_layers,
    make_store,
)

TOTALS = [200, 64, 131, 70]
# (requests, fresh tokens, decode): whole pages, resumed pages, decode that fills and begins pages.
STEPS: list[tuple[list[int], list[int], bool]] = [
    ([0, 1], [100, 63], False),
    ([0, 2, 1], [30, 64, 1], False),
    ([2, 3, 0], [66, 5, 60], False),
    ([0, 2], [1, 1], True),
    ([3], [58], False),
    ([0, 3], [1, 1], True),
    ([0, 3], [1, 1], True),
    ([3], [5], False),
]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", ["hack2", "saw4", "bf16"])
def test_steps_against_fp64(name: str, quantized: bool) -> None:
    store = make_store(name)
    requests = GrowingRequests(store, TOTALS, seed=len(name))
    engine = CpuEngine(store, make_layers(store), requests.req_to_token, quantized)
    for ids, chunks, decode in STEPS:
        prefix_lens = [requests.lens[r] for r in ids]
        outs = requests.step(engine, ids, chunks, decode)
        for layer in range(NUM_LAYERS):
            expected = [
                _expected(requests, layer, r, position, prefix_len, quantized or decode)
                for r, prefix_len, chunk in zip(ids, prefix_lens, chunks, strict=True)
                for position in range(prefix_len, prefix_len + chunk)
            ]
            # bfloat16 rows, scores and outputs
            assert relative_error(outs[layer], torch.stack(expected)) < 1e-2
    assert int(store.num_nonfinite) == 0


def _expected(
    requests: GrowingRequests,
    layer: int,
    request: int,
    position: int,
    prefix_len: int,
    reads_codes: bool,
) -> torch.Tensor:
    """fp64 output of one token: in codes, pages before its own or before the step; else rows."""
    store = requests.store
    end = (position if reads_codes else prefix_len) // PAGE_SIZE * PAGE_SIZE
    pages = store.layers[layer].pages[requests.pages[request][: end // PAGE_SIZE]]
    q, k, v = (rows[request] for rows in requests.qkv[layer])
    seen = []
    for decode, rows in ((decode_keys, k), (decode_values, v)):
        codes = decode(pages, store.layout).transpose(1, 2).flatten(0, 1).double()
        codes[:SINKS] = rows[: min(SINKS, len(codes))]
        seen.append(torch.cat([codes, rows[end : position + 1].double()]))
    out, _ = attend(q[position], *seen, HEAD_DIM**-0.5)
    return out
