from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sgl_kvq.formats.base import PAGE_SIZE, partition_size
from sgl_kvq.formats.dequantize import decode_keys, unpack_planes
from sgl_kvq.formats.registry import format_names
from sgl_kvq.kernels.decode import cpu, reference
from sgl_kvq.memory_pool.storage import PageTable
from tests.support.attention import CHOSEN_BITS, random_cache, relative_error

SEQ_LENS = [1, 63, 64, 65, 128, 1000, 200]
HACK = ["hack2", "hack4", "hack8", "k4v2", "hack2-v1"]
# float32 eager attention over 1,000 tokens is within 1e-6 of float64; large scores add to it.
FLOAT32_BUDGET = 1e-5


@pytest.mark.parametrize("sink_tokens", [0, 4])
@pytest.mark.parametrize("name", [*format_names(), *CHOSEN_BITS])
def test_the_reference_reads_what_a_request_must_see(name: str, sink_tokens: int) -> None:
    generator = torch.Generator().manual_seed(3)
    data = random_cache(name, 64, 2, SEQ_LENS, sink_tokens, generator)
    for request, expected in enumerate(data.kv):
        found = reference.read_sequence(data.cache, data.table, data.layout, request)
        for rows, expected_rows in zip(found, expected, strict=True):
            assert rows.dtype == torch.float64
            assert torch.equal(rows, expected_rows)


@pytest.mark.parametrize("gqa_group", [1, 4])
def test_the_reference_is_softmax_attention(gqa_group: int) -> None:
    generator = torch.Generator().manual_seed(gqa_group)
    q = torch.randn(2 * gqa_group, 64, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(100, 2, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    out, lse = reference.attend(q, k, v, 0.3)
    expected = scaled_dot_product_attention(
        q[None, :, None], k.transpose(0, 1)[None], v.transpose(0, 1)[None],
        scale=0.3, enable_gqa=True,
    )  # fmt: skip
    assert relative_error(out, expected[0, :, 0]) < 1e-12
    keys = k.repeat_interleave(gqa_group, 1)
    weights = ((q * keys).sum(-1) * 0.3).exp().sum(0)
    assert (lse - weights.log2()).abs().max() < 1e-12


@pytest.mark.parametrize("sink_tokens", [0, 4])
@pytest.mark.parametrize("gqa_group", [1, 4])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("name", [*format_names(), *CHOSEN_BITS])
def test_cpu_against_the_reference(
    name: str, head_dim: int, gqa_group: int, sink_tokens: int
) -> None:
    generator = torch.Generator().manual_seed(head_dim + gqa_group)
    data = random_cache(name, head_dim, 2, SEQ_LENS, sink_tokens, generator)
    wide = torch.randn(len(SEQ_LENS), 2 * gqa_group, 2 * head_dim, generator=generator)
    q = wide[..., ::2]  # strided
    plan = cpu.plan_decode(data.table, sink_tokens)
    out, lse = cpu.decode(q, data.cache, plan, data.layout, head_dim**-0.5)
    expected, expected_lse = reference.decode(
        q, data.cache, data.table, data.layout, head_dim**-0.5
    )
    assert relative_error(out, expected) < FLOAT32_BUDGET
    assert (lse - expected_lse).abs().max() < 1e-4


def test_the_rest_of_the_batch_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(7)
    data = random_cache("hack2", 64, 2, SEQ_LENS, 4, generator)
    q = torch.randn(len(SEQ_LENS), 4, 64, generator=generator)
    plan = cpu.plan_decode(data.table, 4)
    whole, _ = cpu.decode(q, data.cache, plan, data.layout, 0.125)
    for i in range(len(SEQ_LENS)):
        indptr = data.table.kv_indptr[i : i + 2]
        alone = PageTable(
            kv_indptr=indptr - indptr[0],
            kv_indices=data.table.kv_indices[indptr[0] : indptr[1]],
            kv_last_page_len=data.table.kv_last_page_len[i : i + 1],
            open_slots=data.table.open_slots[i : i + 1],
            sink_pages=data.table.sink_pages[i : i + 1],
        )
        plan = cpu.plan_decode(alone, 4)
        out, _ = cpu.decode(q[i : i + 1], data.cache, plan, data.layout, 0.125)
        assert relative_error(out[0], whole[i]) < 1e-6


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("name", HACK)
def test_integer_scores_are_those_of_an_8_bit_left_factor(name: str, head_dim: int) -> None:
    """Codes and their sums give the product of the rounded left factor with dequantized keys."""
    generator = torch.Generator().manual_seed(head_dim)
    data = random_cache(name, head_dim, 2, [PAGE_SIZE * 3 + 1], 0, generator)
    layout, coding = data.layout, data.layout.format.k
    rows = data.cache.pages[data.table.kv_indices[:3].long()]
    q = torch.randn(3, 2, 4, head_dim, generator=generator)
    scores = reference.hack_integer_scores(q, rows, layout)

    size = partition_size(head_dim)
    keys = decode_keys(rows, layout).double()
    weights = keys  # what the left factor is multiplied with
    left = q.double()
    if coding.axis == "channel":
        scales = layout.view(rows, "k_scales").double().unsqueeze(2)
        weights = unpack_planes(layout.view(rows, "k_codes"), coding.num_planes, -1).double()
        left = left * scales
    parts = left.unflatten(-1, (-1, size))
    a, step, low = reference.quantize_left(parts)
    assert a.min() == 0
    assert a.max() == 255
    assert torch.equal(a, a.round())
    rounded = step * a + low
    assert ((rounded - parts).abs() <= step / 2 + 1e-12).all()
    exact = q.double() @ keys.transpose(-1, -2)
    moved = (rounded - parts).flatten(-2) @ weights.transpose(-1, -2)
    assert moved.abs().max() > 1e-3  # 8 bits are really in use
    # `decode_keys` rounds to float32.
    assert relative_error(scores, exact + moved) < FLOAT32_BUDGET
