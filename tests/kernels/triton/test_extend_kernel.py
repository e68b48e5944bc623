from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch

from sgl_kvq.attention.plan.extend import plan_extend
from sgl_kvq.attention.plan.passes import plan_passes, scratch_pages_of
from sgl_kvq.attention.plan.upload import upload_extend
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.dequantize import decode_keys, decode_values
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.registry import format_names
from sgl_kvq.host.flash_attention_3 import HOPPER, FlashAttention3
from sgl_kvq.kernels.append.api import append
from sgl_kvq.kernels.extend.api import ExtendWorkspace, extend
from sgl_kvq.kernels.extend.configs import prefill_head_dim
from sgl_kvq.kernels.extend.flashinfer_attention import FlashInferAttention
from sgl_kvq.kernels.extend.merge import merge
from sgl_kvq.kernels.extend.prefill_attention import AttentionShape
from sgl_kvq.memory_pool.storage import PagedCache, SlotMaps
from testbed.formats import named_format
from tests.support import torch_flash_attention
from tests.support.attention import random_rows, relative_error
from tests.support.sink_rows import empty_sink_rows

HEADS, GROUP, SINKS = 2, 3, 4
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(
    params=["flash_attention_3"] if INTERPRETED else ["flash_attention_3", "flashinfer"]
)
def library(
    request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch
) -> type[Any]:
    """What runs the passes; without a GPU, FlashAttention-3's functions are torch's."""
    if request.param == "flashinfer":
        return FlashInferAttention
    if INTERPRETED:
        monkeypatch.setitem(sys.modules, "sgl_kernel.flash_attn", torch_flash_attention)
        return FlashAttention3
    if torch.cuda.get_device_capability()[0] != HOPPER:
        pytest.skip("needs a Hopper GPU")
    pytest.importorskip("sgl_kernel.flash_attn", exc_type=ImportError)
    return FlashAttention3


class Sequences:
    """Requests that grow chunk by chunk in a poisoned cache."""

    def __init__(
        self, name: str, head_dim: int, totals: list[int], device: str, library: type[Any]
    ) -> None:
        self.library = library
        self.generator = torch.Generator().manual_seed(head_dim + len(name))
        self.device = device
        self.layout = PageLayout(named_format(name), head_dim, HEADS)
        shape = (HEADS, head_dim)
        self.kv = [
            [random_rows((n, *shape), self.generator).to(device) for _ in range(2)] for n in totals
        ]
        self.q = [
            torch.randn((n, HEADS * GROUP, head_dim), generator=self.generator)
            .bfloat16()
            .to(device)
            for n in totals
        ]
        self.lens = [0] * len(totals)
        counts = [-(-n // PAGE_SIZE) for n in totals]
        pages = torch.randperm(2 * sum(counts), generator=self.generator)[: sum(counts)] + 1
        self.pages = list(pages.split(counts))
        context = max(counts) * PAGE_SIZE
        req_to_token = torch.zeros((len(totals) + 1, context), dtype=torch.int32)
        for row, own in enumerate(self.pages):
            tokens = own[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)
            req_to_token[row + 1, : tokens.numel()] = tokens.flatten()
        self.req_to_token = req_to_token.to(device)
        num_pages = 2 * sum(counts) + 1
        rows = (len(totals) + 1, 2)
        self.cache = PagedCache(
            torch.full((num_pages, self.layout.page_bytes), 0xFF, dtype=torch.uint8, device=device),
            torch.full((*rows, PAGE_SIZE, *shape), torch.nan, dtype=torch.bfloat16, device=device),
            empty_sink_rows(self.layout, len(totals) + 1, SINKS, device),
        )
        slot_of = torch.zeros(num_pages, dtype=torch.int64)
        for row, own in enumerate(self.pages):
            slot_of[own] = row + 1
        self.slots = SlotMaps(slot_of.to(device), slot_of.to(device))
        self.workspace = ExtendWorkspace(self.layout, 4, device)

    def fresh(self, requests: list[int], chunks: list[int]) -> list[torch.Tensor]:
        """q, k and v of the next chunk of some requests."""
        parts = []
        for source in (self.q, [kv[0] for kv in self.kv], [kv[1] for kv in self.kv]):
            rows = [
                source[r][self.lens[r] : self.lens[r] + n]
                for r, n in zip(requests, chunks, strict=True)
            ]
            parts.append(torch.cat(rows))
        return parts

    def step(
        self,
        requests: list[int],
        chunks: list[int],
        quantized: bool,
        max_pages: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Append the next chunk of some requests and attend."""
        prefix_lens = [self.lens[r] for r in requests]
        q, k, v = self.fresh(requests, chunks)
        plan = plan_extend(prefix_lens, chunks, quantized)
        passes = plan_passes(plan.requests, max_pages)
        rows = torch.tensor([r + 1 for r in requests], device=self.device)
        fills = [one_pass.fills for one_pass in passes]
        batch = upload_extend(plan, fills, rows, self.req_to_token, self.slots)
        prior_rows = batch.prior_rows(self.cache)
        count = torch.zeros((), dtype=torch.int64, device=self.device)
        append(self.cache, self.layout, k, v, batch.touched, count, prior_rows)
        self.num_nonfinite = int(count)
        self.workspace.reserve(scratch_pages_of(passes))
        attention = self.attention()
        attention.plan(passes)
        out = extend(
            q, k, v, self.cache, self.layout, passes, batch.fills,
            batch.touched, prior_rows, attention, self.workspace,
        )  # fmt: skip
        for r, n in zip(requests, chunks, strict=True):
            self.lens[r] += n
        return out

    def attention(self) -> Any:
        head_dim = self.layout.head_dim
        shape = AttentionShape(
            HEADS * GROUP, HEADS, prefill_head_dim(head_dim), torch.bfloat16, head_dim**-0.5
        )
        return self.library(shape, self.device)

    def expected(
        self, request: int, prefix_len: int, quantized: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """fp64 (out, lse) of the tokens from `prefix_len` on, from what each may see."""
        seq_len = self.lens[request]
        exact = [x[:seq_len].double().cpu() for x in self.kv[request]]
        rows = self.cache.pages[self.pages[request][: seq_len // PAGE_SIZE]].cpu()
        closed = []
        for decode, x in zip((decode_keys, decode_values), exact, strict=True):
            values = decode(rows, self.layout).double().transpose(1, 2).flatten(0, 1)
            values[:SINKS] = x[: min(SINKS, len(values))]
            closed.append(values)
        outs, lses = [], []
        for position in range(prefix_len, seq_len):
            seen = position if quantized else prefix_len
            num_closed = seen // PAGE_SIZE * PAGE_SIZE
            k, v = (
                torch.cat([codes[:num_closed], x[num_closed : position + 1]])
                for codes, x in zip(closed, exact, strict=True)
            )
            q = self.q[request][position].double().cpu().view(HEADS, GROUP, -1)
            scores = torch.einsum("hgd,thd->hgt", q, k) * self.layout.head_dim**-0.5
            outs.append(torch.einsum("hgt,thd->hgd", scores.softmax(-1), v).flatten(0, 1))
            lses.append(scores.logsumexp(-1).flatten() * 1.4426950408889634)
        return torch.stack(outs), torch.stack(lses)


def check(
    sequences: Sequences,
    requests: list[int],
    chunks: list[int],
    quantized: bool,
    max_pages: int,
) -> None:
    prefix_lens = [sequences.lens[r] for r in requests]
    out, lse = sequences.step(requests, chunks, quantized, max_pages)
    assert sequences.num_nonfinite == 0
    expected = [
        sequences.expected(r, prefix_len, quantized)
        for r, prefix_len in zip(requests, prefix_lens, strict=True)
    ]
    # Dequantized values and partial results are rounded to bfloat16 (2^-9, under the interpreter
    # some are truncated, 2^-8); scores reach 16.
    assert relative_error(out.cpu(), torch.cat([e[0] for e in expected])) < 8e-3
    if lse is not None:
        assert (lse.cpu() - torch.cat([e[1] for e in expected])).abs().max() < 16 * 2**-8


@pytest.mark.parametrize(
    ("name", "max_pages", "quantized"),
    [
        ("hack2", 4, True),
        ("hack2", 100, False),
        ("saw4", 4, False),
        ("saw4", 100, True),
        pytest.param("hack2", 4, False, marks=pytest.mark.long),
        pytest.param("hack2", 100, True, marks=pytest.mark.long),
        pytest.param("saw4", 4, True, marks=pytest.mark.long),
        pytest.param("saw4", 100, False, marks=pytest.mark.long),
    ],
)
def test_ragged_chunks(
    name: str, max_pages: int, quantized: bool, device: str, library: type[Any]
) -> None:
    """Fresh, resumed and cached sequences in one batch, in one pass and in many."""
    sequences = Sequences(name, 64, [330, 70, 150], device, library)
    check(sequences, [0, 1], [320, 5], quantized, max_pages)
    check(sequences, [0, 1, 2], [1, 60, 64], quantized, max_pages)
    check(sequences, [2, 1, 0], [80, 1, 9], quantized, max_pages)


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [
        *((name, 64) for name in (*format_names(), "4:2:2", "2:16:2")),
        ("hack2", 128),
        ("k4v2", 256),
    ]
    + [(name, head_dim) for name in ("hack4", "saw4") for head_dim in (80, 96)],
)
def test_formats_and_head_dims(name: str, head_dim: int, device: str, library: type[Any]) -> None:
    sequences = Sequences(name, head_dim, [140], device, library)
    check(sequences, [0], [128], False, 8)
    check(sequences, [0], [12], False, 8)


def test_a_bad_row_stays_in_its_sequence(device: str, library: type[Any]) -> None:
    """NaN in one request's key must not reach another request of the batch."""
    sequences = Sequences("hack2", 64, [70, 70], device, library)
    sequences.kv[0][1][3] = torch.nan
    out, _ = sequences.step([0, 1], [66, 66], quantized=False, max_pages=8)
    assert sequences.num_nonfinite == 2 * 64
    assert out[66:].isfinite().all()


def test_merge_of_parts_equals_the_whole(device: str) -> None:
    generator = torch.Generator().manual_seed(4)
    scores = 8 * torch.randn(5, 3, 40, generator=generator)
    values = torch.randn(5, 3, 40, 64, generator=generator)
    scores[0, 0, :16] = scores[1, 1, 16:] = scores[
        2, 2
    ] = -torch.inf  # a part, or both, see nothing

    def attend(keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.einsum(
            "qht,qhtd->qhd", scores[..., keys].softmax(-1).nan_to_num(), values[..., keys, :]
        )
        return out.to(device), (scores[..., keys].logsumexp(-1) * 1.4426950408889634).to(device)

    out, lse = attend(slice(0, 16))
    merge(out, lse, *attend(slice(16, 40)))
    expected, expected_lse = attend(slice(0, 40))
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.allclose(lse, expected_lse, atol=1e-5)


@pytest.mark.gpu
def test_plans_ahead_of_the_device(gpu: str, library: type[Any]) -> None:
    """The host plans forwards while the device is still busy with something before them."""
    head_dim, lens = 64, (70, 300, 130, 1)
    attention = library(AttentionShape(HEADS * GROUP, HEADS, head_dim, torch.bfloat16, 0.125), gpu)
    q, k, v = (
        torch.randn(512, heads, head_dim, device=gpu).bfloat16()
        for heads in (HEADS * GROUP, HEADS, HEADS)
    )

    def attend(num_tokens: int) -> torch.Tensor:
        (step,) = plan_passes(plan_extend([0], [num_tokens], False).requests, 100)
        attention.plan([step])
        out = torch.empty_like(q[:num_tokens])
        lse = torch.empty(out.shape[:2], device=gpu)
        attention.run(0, step, q[:num_tokens], k, v, out, lse)
        return out

    expected = []
    for num_tokens in lens:
        expected.append(attend(num_tokens))
        torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # about half a second
    for out, wanted in zip([attend(num_tokens) for num_tokens in lens], expected, strict=True):
        assert torch.equal(out, wanted)
