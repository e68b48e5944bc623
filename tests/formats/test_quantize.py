from __future__ import annotations

import numpy as np
import pytest
import torch

from sgl_kvq.formats.base import PAGE_SIZE, Coding
from sgl_kvq.formats.dequantize import decode_keys, decode_values, unpack_planes
from sgl_kvq.formats.hadamard import rotate
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.quantize import (
    encode_pages,
    pack_planes,
    quantize_groups,
    quantize_nested,
    replace_nonfinite,
)
from sgl_kvq.formats.registry import format_names, get_format
from testbed.formats import named_format
from tests.support.attention import random_rows

QUANTIZED = [name for name in format_names() if name != "bf16"]


def bf16(x: float) -> np.float32:
    return np.float32(torch.tensor(x, dtype=torch.float32).to(torch.bfloat16).float().item())


def scalar_codes(x: list[float], bits: int, half_up: bool) -> tuple[list[int], float, float]:
    """The formula, one number at a time in float32."""
    top = np.float32(2**bits - 1)
    low = bf16(min(x))
    scale = bf16(float((np.float32(max(x)) - low) / top))
    if not scale > 0:
        scale = np.float32(1)
    codes = []
    for value in x:
        step = (np.float32(value) - low) / scale
        rounded = np.floor(step + np.float32(0.5)) if half_up else np.rint(step)
        codes.append(int(min(max(rounded, 0), top)))
    return codes, float(scale), float(low)


@pytest.mark.parametrize("rounding", ["even", "half_up"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_bit_exact_against_the_formula(bits: int, rounding: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    groups = [
        *random_rows((20, 1, 64), generator).float().squeeze(1).tolist(),
        [0.0, 3.0, 0.5, 1.5, 2.5, 1.0, 2.0, 0.25],  # 2 bits: scale 1, exact ties at .5
        [0.0, 15.0, 0.5, 1.5, 2.5, 7.5, 14.5, 13.5],  # 4 bits: likewise
        [0.0, 255.0, 0.5, 1.5, 2.5, 127.5, 254.5, 1.0],  # 8 bits: likewise
        [0.7109375] * 8,  # constant
        [0.0] * 8,
        [-0.0, 0.0, 0.0, -0.0],
        [8e37, -8e37, 0.0, 1.0],  # as far apart as float32 allows
        [1e-40, 2e-40, 0.0, 3e-40],  # denormal
    ]
    coding = Coding(bits, rounding=rounding)  # type: ignore[arg-type]
    for group in groups:
        expected, scale, low = scalar_codes(group, bits, rounding == "half_up")
        codes, scales, mins = quantize_groups(torch.tensor([group]), coding, dim=-1)
        assert codes[0].tolist() == expected
        assert (scales.item(), mins.item()) == (scale, low)


def test_ties_round_to_even_or_up() -> None:
    x = torch.tensor([[0.0, 0.5, 1.5, 2.5, 3.0]])
    even, _, _ = quantize_groups(x, Coding(2), dim=-1)
    up, _, _ = quantize_groups(x, Coding(2, rounding="half_up"), dim=-1)
    assert even.tolist() == [[0, 0, 2, 2, 3]]
    assert up.tolist() == [[0, 1, 2, 3, 3]]


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("name", QUANTIZED)
def test_round_trip_is_within_half_a_step(name: str, head_dim: int) -> None:
    """|value - x| <= scale / 2, plus what rounding min and scale to bfloat16 can add.

    The stored minimum lies within 2^-9 |min| of the true one and the top code within
    (2^b - 1) * 2^-9 * scale of the true maximum.
    """
    generator = torch.Generator().manual_seed(1)
    layout = PageLayout(get_format(name), head_dim, 2)
    k = random_rows((3, PAGE_SIZE, 2, head_dim), generator)
    v = random_rows((3, PAGE_SIZE, 2, head_dim), generator)
    rows = encode_pages(k, v, torch.zeros(3, dtype=torch.int32), layout)
    for tensor, x, decode in (("k", k, decode_keys), ("v", v, decode_values)):
        coding = getattr(layout.format, tensor)
        exact, values = x.float().transpose(1, 2), decode(rows, layout)
        if coding.rotated:
            exact, values = (rotate(y, layout.rotation_order) for y in (exact, values))
        scales, mins = (layout.view(rows, f"{tensor}_{m}").float() for m in ("scales", "mins"))
        if coding.axis == "channel":
            scales, mins = scales.unsqueeze(2), mins.unsqueeze(2)
        else:
            repeat = head_dim // scales.shape[2]
            scales, mins = (
                y.transpose(2, 3).repeat_interleave(repeat, dim=-1) for y in (scales, mins)
            )
        budget = scales * (0.5 + coding.max_code * 2**-9) + mins.abs() * 2**-9 + 1e-6
        assert ((values - exact).abs() <= budget).all()


def nested_codes(x: list[float], bits: int) -> tuple[list[int], float, float]:
    """The formula of nested codes, one number at a time in float32."""
    top = np.float32(2**bits - 1)
    low, high = np.float32(min(x)), np.float32(max(x))
    margin = (high - low) * np.float32(1.5 / (4 * 2**bits - 1))
    middle = bf16(float(low + margin))
    scale = bf16(float((high - margin - middle) / top))
    if not scale > 0:
        scale = np.float32(2**-20)
    steps = [(np.float32(value) - middle) / scale * np.float32(4) + np.float32(1.5) for value in x]
    return [int(min(max(np.rint(s), 0), 4 * top + 3)) for s in steps], float(scale), float(middle)


@pytest.mark.parametrize("bits", [2, 4])
def test_nested_codes_are_bit_exact_against_the_formula(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    groups = [
        *random_rows((20, 1, 64), generator).float().squeeze(1).tolist(),
        *(random_rows((5, 1, 64), generator).float() + 300).bfloat16().float().squeeze(1).tolist(),
        [0.0, 15.0, 1.5, 3.5, 5.5, 7.5, 11.5, 13.5],  # 2 bits: scale 4, ties
        [0.7109375] * 8,  # constant
        [0.0] * 8,
        [8e37, -8e37, 0.0, 1.0],
        [1e-40, 2e-40, 0.0, 3e-40],  # denormal
    ]
    for group in groups:
        expected, scale, middle = nested_codes(group, bits)
        x = torch.tensor([group])
        codes, scales, mins = quantize_nested(x, -1, 2**bits - 1)
        assert codes[0].tolist() == expected
        assert (scales.item(), mins.item()) == (scale, middle)
        leading, *metadata = quantize_groups(x, Coding(bits, nested=True), -1)
        assert leading[0].tolist() == [code >> 2 for code in expected]
        assert metadata == [scales, mins]


def test_cells_are_of_equal_width_over_the_whole_range() -> None:
    """16 steps from 0 to 15: four a cell, read at its middle, or all of them."""
    x = torch.arange(16.0)[None]
    codes, scales, mins = quantize_nested(x, -1, 3)
    assert codes[0].tolist() == list(range(16))
    assert ((codes >> 2) * scales + mins)[0].tolist() == [c // 4 * 4 + 1.5 for c in range(16)]
    assert torch.equal((codes / 4 - 0.375) * scales + mins, x)


@pytest.mark.parametrize(("bits", "rounding"), [(8, "even"), (2, "half_up")])
def test_nested_codes_that_no_kernel_writes_are_refused(bits: int, rounding: str) -> None:
    with pytest.raises(ValueError, match=f"nested: .*rounding {rounding} and {bits} bits"):
        Coding(bits, rounding=rounding, nested=True)  # type: ignore[arg-type]


def test_equal_values_come_back_with_and_without_low_order_bits() -> None:
    x = torch.tensor([[0.0], [-7.5], [65280.0]]).expand(3, 64)
    codes, scales, mins = quantize_nested(x, -1, 3)
    assert torch.equal((codes >> 2) * scales.float() + mins, x)
    torch.testing.assert_close((codes / 4 - 0.375) * scales + mins, x, rtol=0, atol=2**-22)


@pytest.mark.parametrize(("name", "num_outliers"), [("kvq2", 24), ("kvq4", 4), ("4:2:2", 8)])
def test_outlier_channels_have_two_bits_more(name: str, num_outliers: int) -> None:
    """Their values lie within an eighth of the stored step; the other channels' do not."""
    generator = torch.Generator().manual_seed(5)
    layout = PageLayout(named_format(name), 64, 2)
    k = torch.rand((3, PAGE_SIZE, 2, 64), generator=generator).to(torch.bfloat16)
    rows = encode_pages(k, k, torch.zeros(3, dtype=torch.int32), layout)
    error = (decode_keys(rows, layout) - k.float().transpose(1, 2)).abs()
    steps = error / layout.view(rows, "k_scales").float().unsqueeze(2)
    assert steps[..., :num_outliers].quantile(0.99) <= 0.13
    assert steps[..., num_outliers:].quantile(0.99) > 0.4


@pytest.mark.parametrize("name", QUANTIZED)
def test_sink_tokens_do_not_touch_the_scales_of_others(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    layout = PageLayout(get_format(name), 64, 1)
    k, v = (random_rows((1, PAGE_SIZE, 1, 64), generator) for _ in range(2))
    sinks = torch.tensor([4], dtype=torch.int32)
    plain = encode_pages(k, v, sinks, layout)
    loud_k, loud_v = k.clone(), v.clone()
    loud_k[:, :4] *= 1000
    loud_v[:, :4] *= 1000
    loud = encode_pages(loud_k, loud_v, sinks, layout)
    for decode in (decode_keys, decode_values):
        assert torch.equal(decode(plain, layout)[:, :, 4:], decode(loud, layout)[:, :, 4:])


def test_bf16_pages_are_the_rows() -> None:
    generator = torch.Generator().manual_seed(4)
    layout = PageLayout(get_format("bf16"), 96, 2)
    k, v = (random_rows((2, PAGE_SIZE, 2, 96), generator) for _ in range(2))
    rows = encode_pages(k, v, torch.zeros(2, dtype=torch.int32), layout)
    assert torch.equal(decode_keys(rows, layout), k.float().transpose(1, 2))
    assert torch.equal(decode_values(rows, layout), v.float().transpose(1, 2))


@pytest.mark.parametrize("planes", [1, 2, 4])
def test_packing_is_invertible_and_places_channels(planes: int) -> None:
    codes = torch.randint(0, 256 >> (8 - 8 // planes), (3, 64), dtype=torch.int32).to(torch.uint8)
    packed = pack_planes(codes, planes, -1)
    assert torch.equal(unpack_planes(packed, planes, -1), codes)
    width = 64 // planes
    for plane in range(planes):
        field = (packed[0, 5] >> (plane * 8 // planes)) & ((1 << (8 // planes)) - 1)
        assert field == codes[0, plane * width + 5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_nonfinite_rows_are_refused(bad: float) -> None:
    layout = PageLayout(get_format("hack2"), 64, 1)
    k = torch.zeros(1, PAGE_SIZE, 1, 64, dtype=torch.bfloat16)
    k[0, 3, 0, 7] = bad
    with pytest.raises(ValueError, match="k: expected finite values"):
        encode_pages(k, torch.zeros_like(k), torch.zeros(1, dtype=torch.int32), layout)


def test_nonfinite_elements_keep_other_channels_exact() -> None:
    generator = torch.Generator().manual_seed(5)
    layout = PageLayout(get_format("hack4"), 64, 1)
    k = random_rows((1, PAGE_SIZE, 1, 64), generator)
    bad = k.clone()
    bad[0, 3, 0, 7], bad[0, 9, 0, 8], bad[0, 10, 0, 8] = torch.nan, torch.inf, -torch.inf
    finite, count = replace_nonfinite(bad)
    assert int(count) == 3
    none = torch.zeros(1, dtype=torch.int32)
    clean = decode_keys(encode_pages(k, k, none, layout), layout)
    values = decode_keys(encode_pages(finite, finite, none, layout), layout)
    others = [channel for channel in range(64) if channel not in (7, 8)]
    assert torch.equal(values[..., others], clean[..., others])
    assert torch.isfinite(values).all()


def test_wrong_shape_or_dtype_is_refused() -> None:
    layout = PageLayout(get_format("hack2"), 64, 2)
    none = torch.zeros(1, dtype=torch.int32)
    good = torch.zeros(1, PAGE_SIZE, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"v: expected \[N, 64, 2, 64\]"):
        encode_pages(good, good[:, :32], none, layout)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        encode_pages(good.float(), good, none, layout)
