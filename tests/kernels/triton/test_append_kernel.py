from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.hadamard import rotate
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.quantize import encode_pages, replace_nonfinite
from sgl_kvq.formats.registry import format_names, get_format
from sgl_kvq.kernels.append import api
from sgl_kvq.kernels.append.api import PagedLayers, TouchedPages, append, close_pages
from sgl_kvq.kernels.append.quantize import divisors, quotient
from sgl_kvq.kernels.common.rotation import rotate_rows
from sgl_kvq.memory_pool.storage import PagedCache, PageTable
from testbed.formats import named_format
from tests.support.attention import CHOSEN_BITS, random_rows
from tests.support.sink_rows import empty_sink_rows

SINKS = 4
HEADS = 2


def ints(device: str, *values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def empty_cache(layout: PageLayout, device: str) -> PagedCache:
    rows = (layout.num_kv_heads, layout.head_dim)
    return PagedCache(
        pages=torch.zeros((6, layout.page_bytes), dtype=torch.uint8, device=device),
        open_rows=torch.zeros((5, 2, PAGE_SIZE, *rows), dtype=layout.row_dtype, device=device),
        sink_rows=empty_sink_rows(layout, 4, SINKS, device),
    )


def extend(
    layout: PageLayout, k: torch.Tensor, v: torch.Tensor, prior: torch.Tensor
) -> tuple[PagedCache, int]:
    """Page 3 (first) and page 5 (10 earlier rows) fill; page 1 keeps 5 rows in slot 3."""
    device = k.device.type
    cache = empty_cache(layout, device)
    touched = TouchedPages(
        pages=ints(device, 3, 1, 5),
        slots=ints(device, 2, 3, 4),
        sink_pages=ints(device, 2, 0, 0),
        prior=ints(device, 0, 0, 0),
        first=ints(device, 0, 0, 10),
        end=ints(device, 64, 5, 64),
        start=ints(device, 0, 64, 69),
        is_first=ints(device, 1, 0, 0),
    )
    count = torch.zeros((), dtype=torch.int64, device=device)
    append(cache, layout, k, v, touched, count, prior)
    return cache, int(count)


def expected_pages(
    layout: PageLayout, k: torch.Tensor, v: torch.Tensor, prior: torch.Tensor
) -> torch.Tensor:
    def pages(rows: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
        full = torch.stack([rows[:64], torch.cat([earlier[:10], rows[69:]])])
        return replace_nonfinite(full)[0].cpu()

    sinks = torch.tensor([SINKS, 0], dtype=torch.int32)
    return encode_pages(pages(k, prior[0, 0]), pages(v, prior[0, 1]), sinks, layout)


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [
        *((name, 64) for name in (*format_names(), *CHOSEN_BITS)),
        ("kvq2", 96),
        ("kvq2", 128),
        ("hack2", 128),
        ("hack4", 256),
    ]
    + [(name, head_dim) for name in ("hack2", "saw4", "hack2-v1") for head_dim in (80, 96)],
)
def test_bytes_equal_the_reference(name: str, head_dim: int, device: str) -> None:
    layout = PageLayout(named_format(name), head_dim, HEADS)
    generator = torch.Generator().manual_seed(head_dim)
    k, v = (random_rows((123, HEADS, head_dim), generator).to(device) for _ in range(2))
    k[:, 0, :3] = torch.arange(123, device=device)[:, None].bfloat16() % 7 / 2  # ties
    k[:, 1, 40], v[:, 1, 5], v[7, 0] = 3.0, 3.0, 0.5  # groups of equal values
    prior = random_rows((1, 2, PAGE_SIZE, HEADS, head_dim), generator).to(device)
    cache, count = extend(layout, k, v, prior)
    assert count == 0
    assert torch.equal(cache.pages[[3, 5]].cpu(), expected_pages(layout, k, v, prior))
    assert torch.equal(cache.open_rows[3, 0, :5], k[64:69])
    assert torch.equal(cache.open_rows[3, 1, :5], v[64:69])
    assert torch.equal(cache.sink_rows[2], torch.stack([k[:SINKS], v[:SINKS]]))
    untouched = [0, 1, 2, 4]
    assert not cache.pages[untouched].any()
    assert not cache.open_rows[untouched].any()
    assert not cache.open_rows[3, :, 5:].any()


def test_nonfinite_elements_are_replaced_and_counted(device: str) -> None:
    layout = PageLayout(get_format("hack2"), 64, HEADS)
    generator = torch.Generator().manual_seed(1)
    k, v = (random_rows((123, HEADS, 64), generator).to(device) for _ in range(2))
    prior = random_rows((1, 2, PAGE_SIZE, HEADS, 64), generator).to(device)
    k[0, 0, 0], k[70, 1, 3], v[5, 0, 7] = torch.nan, -torch.inf, torch.inf
    cache, count = extend(layout, k, v, prior)
    assert count == 3
    assert torch.equal(cache.pages[[3, 5]].cpu(), expected_pages(layout, k, v, prior))
    assert cache.sink_rows[2].isfinite().all()


FULL_SLOTS = {1: 2, 3: 4}  # request: its open slot


def decode_table(device: str) -> PageTable:
    """Of four requests, 1 fills its third page (5) and 3 its first (2); 0 is a padding row."""
    return PageTable(
        kv_indptr=ints(device, 0, 1, 4, 5, 6),
        kv_indices=ints(device, 0, 1, 3, 5, 4, 2),
        kv_last_page_len=ints(device, 1, 64, 63, 64),
        open_slots=ints(device, 0, FULL_SLOTS[1], 1, FULL_SLOTS[3]),
        sink_pages=ints(device, 0, 1, 2, 3),
    )


@pytest.mark.parametrize(
    ("name", "head_dim", "num_layers"),
    [*((name, 64, 2) for name in format_names()), ("kvq2", 128, 1), ("hack4", 256, 1)]
    + [(name, head_dim, 3) for name in ("hack2", "saw4") for head_dim in (80, 96)],
)
def test_full_pages_close_in_every_layer(
    name: str, head_dim: int, num_layers: int, device: str
) -> None:
    layout = PageLayout(get_format(name), head_dim, HEADS)
    generator = torch.Generator().manual_seed(head_dim)
    caches = []
    for _ in range(num_layers):
        caches.append(empty_cache(layout, device))
        caches[-1].open_rows.copy_(random_rows(caches[-1].open_rows.shape, generator))
        caches[-1].open_rows[[0, 1, 3]] = torch.nan  # nobody may look at these
        caches[-1].sink_rows.fill_(torch.nan)
        caches[-1].pages.fill_(0xFF)
    caches[0].open_rows[4, 0, 63, 1, 5] = torch.inf
    caches[-1].open_rows[2, 1, 0, 0, 1:3] = torch.nan
    rows = [cache.open_rows.clone() for cache in caches]
    count = torch.zeros((), dtype=torch.int64, device=device)
    close_pages(PagedLayers(caches), layout, decode_table(device), count)
    assert int(count) == 3
    sinks = torch.tensor([0, SINKS], dtype=torch.int32)
    for cache, before in zip(caches, rows, strict=True):
        assert torch.equal(cache.open_rows.view(torch.int16), before.view(torch.int16))
        full, _ = replace_nonfinite(before[list(FULL_SLOTS.values())].cpu())
        expected = encode_pages(full[:, 0], full[:, 1], sinks, layout)
        assert torch.equal(cache.pages[[5, 2]].cpu(), expected)
        assert torch.equal(cache.sink_rows[3].cpu(), full[1, :, :SINKS])
        assert cache.sink_rows[:3].isnan().all()
        assert (cache.pages[[0, 1, 3, 4]] == 0xFF).all()


def test_programs_take_several_pages(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = PageLayout(get_format("hack4"), 64, HEADS)
    cache = empty_cache(layout, device)
    cache.open_rows.copy_(random_rows(cache.open_rows.shape, torch.Generator().manual_seed(7)))
    other = empty_cache(layout, device)
    other.open_rows.copy_(cache.open_rows)
    count = torch.zeros((), dtype=torch.int64, device=device)
    close_pages(PagedLayers([cache]), layout, decode_table(device), count)
    monkeypatch.setattr(api, "CLOSE_PROGRAMS", 3)
    close_pages(PagedLayers([other]), layout, decode_table(device), count)
    assert cache.pages[[2, 5]].any(1).all()
    assert torch.equal(cache.pages, other.pages)
    assert torch.equal(cache.sink_rows.view(torch.int16), other.sink_rows.view(torch.int16))


@triton.jit
def _count_wrong_quotients(scales_ptr, first_bits, wrong_ptr, BLOCK: tl.constexpr):
    scale = tl.load(scales_ptr + tl.program_id(0)).to(tl.float32)
    bits = first_bits + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = bits.to(tl.float32, bitcast=True)
    scales, _ = tl.broadcast(scale, x)
    found = quotient(x, *divisors(scales, scales * 0.0))
    differs = found != tl.math.div_rn(x, scales)
    tl.atomic_add(wrong_ptr, tl.sum(differs.to(tl.int32), axis=0))


@pytest.mark.parametrize("exponent", [0, 1, 2, 40, 66, 67, 68, 107, 127, 142])
def test_every_quotient_is_correctly_rounded(exponent: int, gpu: str) -> None:
    """All scales of one bfloat16 exponent (0: subnormal) against all x, quotients 1/8 to 1024."""
    scales = torch.arange(128, dtype=torch.int16, device=gpu) + exponent * 128
    scales = scales[scales > 0].view(torch.bfloat16)
    wrong = torch.zeros((), dtype=torch.int32, device=gpu)
    for binade in range(max(0, exponent - 3), exponent + 11):
        grid = (len(scales), 2**23 // 1024)
        _count_wrong_quotients[grid](
            scales, binade * 2**23, wrong, BLOCK=1024, enable_fp_fusion=False
        )
    assert int(wrong) == 0


@pytest.mark.parametrize(("head_dim", "order"), [(128, 128), (64, 64), (80, 16), (96, 32)])
def test_rotation_equals_the_reference(head_dim: int, order: int, device: str) -> None:
    x = torch.randn(3, 5, head_dim, generator=torch.Generator().manual_seed(3)).bfloat16()
    rotated = rotate_rows(x.to(device), order)
    assert torch.equal(rotated.cpu(), rotate(x.float(), order))


def test_wrong_rows_are_refused(device: str) -> None:
    layout = PageLayout(get_format("hack2"), 64, HEADS)
    k = torch.zeros(123, HEADS, 64, device=device)
    with pytest.raises(ValueError, match=r"k: expected torch.bfloat16 with contiguous channels"):
        extend(layout, k, k, torch.zeros(1, 2, PAGE_SIZE, HEADS, 64, device=device))
