from __future__ import annotations

import pytest
import torch
from helpers import random_rows

from sgl_kvq.config import PAGE_SIZE
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.registry import format_names, get_format
from sgl_kvq.kernels._rotation import rotate_rows
from sgl_kvq.kernels.append.api import TouchedPages, append
from sgl_kvq.kernels.append.reference import contain_non_finite, encode_pages
from sgl_kvq.kernels.hadamard import rotate
from sgl_kvq.kernels.paged_cache import PagedCache

SINKS = 4
HEADS = 2


def ints(device: str, *values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def empty_cache(layout: PageLayout, device: str) -> PagedCache:
    rows = (layout.num_kv_heads, layout.head_dim)
    return PagedCache(
        pages=torch.zeros((6, layout.page_bytes), dtype=torch.uint8, device=device),
        open_rows=torch.zeros((5, 2, PAGE_SIZE, *rows), dtype=layout.row_dtype, device=device),
        sink_rows=torch.zeros((4, 2, SINKS, *rows), dtype=layout.row_dtype, device=device),
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
        sink_slots=ints(device, 2, 0, 0),
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
        return contain_non_finite(full)[0].cpu()

    sinks = torch.tensor([SINKS, 0], dtype=torch.int32)
    return encode_pages(pages(k, prior[0, 0]), pages(v, prior[0, 1]), sinks, layout)


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [
        *((name, 64) for name in format_names()),
        ("kvq2", 128),
        ("hack2", 128),
        ("hack4", 256),
    ]
    + [(name, head_dim) for name in ("hack2", "saw4", "hack2-v1") for head_dim in (80, 96)],
)
def test_bytes_equal_the_reference(name: str, head_dim: int, device: str) -> None:
    layout = PageLayout(get_format(name), head_dim, HEADS)
    generator = torch.Generator().manual_seed(head_dim)
    k, v = (random_rows((123, HEADS, head_dim), generator).to(device) for _ in range(2))
    k[:, 0, :3] = torch.arange(123, device=device)[:, None].bfloat16() % 7 / 2  # ties
    v[:, 1, 5] = 3.0  # constant
    prior = random_rows((1, 2, PAGE_SIZE, HEADS, head_dim), generator).to(device)
    cache, count = extend(layout, k, v, prior)
    assert count == 0
    differing = cache.pages[[3, 5]].cpu() != expected_pages(layout, k, v, prior)
    # Two ranges that fit equally well: the order in which errors are added decides.
    fitted = layout.format.k.fitted or layout.format.v.fitted
    assert differing.float().mean() <= (0.003 if fitted else 0)
    assert torch.equal(cache.open_rows[3, 0, :5], k[64:69])
    assert torch.equal(cache.open_rows[3, 1, :5], v[64:69])
    assert torch.equal(cache.sink_rows[2], torch.stack([k[:SINKS], v[:SINKS]]))
    untouched = [0, 1, 2, 4]
    assert not cache.pages[untouched].any()
    assert not cache.open_rows[untouched].any()
    assert not cache.open_rows[3, :, 5:].any()


def test_bad_elements_are_contained_and_counted(device: str) -> None:
    layout = PageLayout(get_format("hack2"), 64, HEADS)
    generator = torch.Generator().manual_seed(1)
    k, v = (random_rows((123, HEADS, 64), generator).to(device) for _ in range(2))
    prior = random_rows((1, 2, PAGE_SIZE, HEADS, 64), generator).to(device)
    k[0, 0, 0], k[70, 1, 3], v[5, 0, 7] = torch.nan, -torch.inf, torch.inf
    cache, count = extend(layout, k, v, prior)
    assert count == 3
    assert torch.equal(cache.pages[[3, 5]].cpu(), expected_pages(layout, k, v, prior))
    assert cache.sink_rows[2].isfinite().all()


def test_decode_keeps_the_rows_of_a_page_that_fills(device: str) -> None:
    layout = PageLayout(get_format("hack4"), 64, HEADS)
    generator = torch.Generator().manual_seed(2)
    cache = empty_cache(layout, device)
    rows = random_rows((2, PAGE_SIZE, HEADS, 64), generator).to(device)
    cache.open_rows[2] = rows
    cache.open_rows[2, :, 63] = torch.nan  # an earlier owner's
    k, v = rows[0, 63:].clone(), rows[1, 63:].clone()
    touched = TouchedPages(
        pages=ints(device, 4, 5),
        slots=ints(device, 2, 1),
        sink_slots=ints(device, 0, 0),
        prior=ints(device, 2, 1),
        first=ints(device, 63, 7),
        end=ints(device, 64, 8),
        start=ints(device, 0, 0),
        is_first=ints(device, 0, 0),
    )
    count = torch.zeros((), dtype=torch.int64, device=device)
    append(cache, layout, k, v, touched, count)
    none = torch.zeros(1, dtype=torch.int32)
    encoded = encode_pages(rows[0][None].cpu(), rows[1][None].cpu(), none, layout)
    assert torch.equal(cache.pages[[4]].cpu(), encoded)
    assert torch.equal(cache.open_rows[2], rows)
    assert torch.equal(cache.open_rows[1, :, 7], torch.stack([k[0], v[0]]))
    assert not cache.pages[5].any()


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
