from __future__ import annotations

import pytest
import torch

from sgl_kvq.formats.base import PAGE_SIZE, partition_size
from sgl_kvq.formats.dequantize import unpack_planes
from sgl_kvq.formats.registry import format_names
from sgl_kvq.kernels.decode import reference
from tests.support.attention import (
    CHOSEN_BITS,
    RandomCache,
    attention_fp64,
    random_cache,
    relative_error,
)

SEQ_LENS = [1, 63, 64, 65, 128, 1000, 200]
INTEGER = ["hack2", "hack4", "hack8", "k4v2", "hack2-v1"]
# float32 eager attention over 1,000 tokens is within 1e-6 of fp64; scores of size ~100 add to it.
FLOAT32_BUDGET = 1e-5


def homomorphic_budget(max_code: int) -> float:
    """Terms of up to max_code times the result cancel (8-bit codes against their minimum)."""
    return FLOAT32_BUDGET * (1 + max_code / 16)


def reference_outputs(data: RandomCache, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = data.layout.head_dim**-0.5
    pairs = [attention_fp64(x, *kv, scale) for x, kv in zip(q, data.kv, strict=True)]
    return torch.stack([out for out, _ in pairs]), torch.stack([lse for _, lse in pairs])


@pytest.mark.parametrize("sink_tokens", [0, 4])
@pytest.mark.parametrize("gqa_group", [1, 4])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("name", [*format_names(), *CHOSEN_BITS])
def test_against_fp64_on_dequantized_pages(
    name: str, head_dim: int, gqa_group: int, sink_tokens: int
) -> None:
    generator = torch.Generator().manual_seed(head_dim + gqa_group)
    data = random_cache(name, head_dim, 2, SEQ_LENS, sink_tokens, generator)
    wide = torch.randn(len(SEQ_LENS), 2 * gqa_group, 2 * head_dim, generator=generator)
    q = wide[..., ::2]  # strided
    plan = reference.plan_decode(data.table, sink_tokens)
    out, lse = reference.decode(q, data.cache, plan, data.layout, head_dim**-0.5)
    expected, expected_lse = reference_outputs(data, q)
    assert relative_error(out, expected) < FLOAT32_BUDGET
    assert (lse - expected_lse).abs().max() < 1e-4


def test_the_rest_of_the_batch_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(7)
    data = random_cache("hack2", 64, 2, SEQ_LENS, 4, generator)
    q = torch.randn(len(SEQ_LENS), 4, 64, generator=generator)
    plan = reference.plan_decode(data.table, 4)
    whole, _ = reference.decode(q, data.cache, plan, data.layout, 0.125, "integer")
    for i in range(len(SEQ_LENS)):
        indptr = data.table.kv_indptr[i : i + 2]
        alone = reference.PageTable(
            kv_indptr=indptr - indptr[0],
            kv_indices=data.table.kv_indices[indptr[0] : indptr[1]],
            kv_last_page_len=data.table.kv_last_page_len[i : i + 1],
            open_slots=data.table.open_slots[i : i + 1],
            sink_slots=data.table.sink_slots[i : i + 1],
        )
        plan = reference.plan_decode(alone, 4)
        out, _ = reference.decode(q[i : i + 1], data.cache, plan, data.layout, 0.125, "integer")
        assert relative_error(out[0], whole[i]) < 1e-6


def eight_bit(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha * a + mu along the last dimension and the step alpha; codes made in float32."""
    assert x.dtype == torch.float32
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low) / 255
    step = torch.where(step > 0, step, torch.ones_like(step))
    return ((x - low) / step).round().double() * step.double() + low.double(), step


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("name", INTEGER)
def test_homomorphic_scores_equal_dequantize_then_multiply(name: str, head_dim: int) -> None:
    """Codes and their sums give the product of the 8-bit left factor with dequantized keys."""
    generator = torch.Generator().manual_seed(head_dim)
    data = random_cache(name, head_dim, 2, [PAGE_SIZE * 3 + 1], 0, generator)
    layout, coding = data.layout, data.layout.format.k
    rows = data.cache.pages[data.table.kv_indices[:3].long()]
    q = torch.randn(3, 2, 4, head_dim, generator=generator)
    scores = reference.page_scores(q, rows, layout, integer=True)

    codes = unpack_planes(layout.view(rows, "k_codes"), coding.num_planes, -1).double()
    scales = layout.view(rows, "k_scales").double()
    mins = layout.view(rows, "k_mins").double()
    size = partition_size(head_dim)
    if coding.axis == "channel":
        left = (q * scales.float().unsqueeze(2)).unflatten(-1, (-1, size))
        left, step = eight_bit(left)
        expected = left.flatten(-2) @ codes.transpose(-1, -2)
        expected += (q.double() * mins.unsqueeze(2)).sum(-1, keepdim=True)
        exact = (q.double() * scales.unsqueeze(2)) @ codes.transpose(-1, -2)
        exact += (q.double() * mins.unsqueeze(2)).sum(-1, keepdim=True)
    else:
        left, step = eight_bit(q.unflatten(-1, (-1, size)))
        repeat = (y.transpose(2, 3).repeat_interleave(size, -1) for y in (scales, mins))
        spread, offset = repeat
        keys = codes * spread + offset
        expected = left.flatten(-2) @ keys.transpose(-1, -2)
        exact = q.double() @ keys.transpose(-1, -2)
    assert relative_error(scores, expected) < homomorphic_budget(coding.max_code)
    # Rounding u to 8 bits moves a score by at most step/2 for each unit of code (or |k| unit).
    bound = keys.abs().sum(-1) if coding.axis == "token" else codes.sum(-1)
    limit = step.amax((-1, -2)).unsqueeze(-1) / 2 * bound.unsqueeze(2)
    assert ((scores - exact).abs() <= limit * 1.001 + 1e-4).all()


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("name", INTEGER)
def test_homomorphic_values_equal_dequantize_then_multiply(name: str, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    data = random_cache(name, head_dim, 2, [PAGE_SIZE * 3 + 1], 0, generator)
    layout, coding = data.layout, data.layout.format.v
    rows = data.cache.pages[data.table.kv_indices[:3].long()]
    weights = torch.rand(3, 2, 4, PAGE_SIZE, generator=generator).pow(8)
    out = reference.page_values(weights, rows, layout, integer=True)

    codes = unpack_planes(layout.view(rows, "v_codes"), coding.num_planes, -2).double()  # [N,H,D,P]
    scales = layout.view(rows, "v_scales").double()
    mins = layout.view(rows, "v_mins").double()
    if coding.axis == "token":
        size = partition_size(head_dim)
        left, _ = eight_bit(weights.unsqueeze(2) * scales.float().unsqueeze(3))
        grouped = codes.unflatten(2, (-1, size))  # [N, H, groups, D/groups, P]
        expected = (left @ grouped.transpose(-1, -2)).transpose(2, 3).flatten(-2)
        offset = weights.double() @ mins.transpose(-1, -2)
        expected += offset.repeat_interleave(size, -1)
    else:
        left, _ = eight_bit(weights)
        expected = (left @ codes.transpose(-1, -2)) * scales.unsqueeze(2)
        expected += weights.double().sum(-1, keepdim=True) * mins.unsqueeze(2)
    assert relative_error(out, expected) < homomorphic_budget(coding.max_code)


@pytest.mark.parametrize("name", INTEGER)
def test_integer_arithmetic_stays_near_float(name: str) -> None:
    """8-bit queries and probabilities cost less than a 4-bit page: a check on the whole path."""
    generator = torch.Generator().manual_seed(11)
    data = random_cache(name, 128, 2, SEQ_LENS, 4, generator)
    q = 0.2 * torch.randn(len(SEQ_LENS), 8, 128, generator=generator)
    plan = reference.plan_decode(data.table, 4)
    out, _ = reference.decode(q, data.cache, plan, data.layout, 128**-0.5, "integer")
    expected, _ = reference_outputs(data, q)
    assert relative_error(out, expected) < 0.02
