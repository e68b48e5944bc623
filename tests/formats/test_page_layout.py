from __future__ import annotations

import pytest
import torch

from sgl_kvq.errors import ConfigError
from sgl_kvq.formats.base import PAGE_SIZE, Coding, hadamard_order, partition_size
from sgl_kvq.formats.page_layout import ALIGNMENT_BYTES, PageLayout
from sgl_kvq.formats.registry import format_names, get_format
from sgl_kvq.formats.scalar import ScalarFormat

HEAD_DIMS = (64, 80, 96, 128, 256)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", format_names())
def test_fields_are_aligned_disjoint_and_inside_the_row(name: str, head_dim: int) -> None:
    layout = PageLayout(get_format(name), head_dim, num_kv_heads=3)
    end = 0
    for field in layout.fields.values():
        assert field.offset_bytes % ALIGNMENT_BYTES == 0
        assert field.offset_bytes >= end
        end = field.offset_bytes + field.size_bytes
    assert end <= layout.head_bytes
    assert layout.page_bytes == 3 * layout.head_bytes


def test_heads_are_the_outer_axis_so_a_rank_is_one_byte_range() -> None:
    whole = PageLayout(get_format("hack2"), 128, num_kv_heads=8)
    half = PageLayout(get_format("hack2"), 128, num_kv_heads=4)
    rows = torch.arange(2 * whole.page_bytes, dtype=torch.int64).remainder(251).to(torch.uint8)
    rows = rows.view(2, whole.page_bytes)
    second = rows[:, half.page_bytes :].contiguous()
    for name in whole.fields:
        assert torch.equal(
            whole.view(rows, name)[:, 4:].contiguous().view(torch.uint8),
            half.view(second, name).contiguous().view(torch.uint8),
        )


@pytest.mark.parametrize(
    ("name", "head_dim", "bytes_per_token"),
    [
        ("hack2", 128, 80),
        ("hack4", 128, 144),
        ("kivi2", 128, 80),
        ("saw4", 128, 136),
        ("hack2", 64, 40),
        ("hack4", 64, 72),
        ("bf16", 64, 256),
        ("k4v2", 64, 56),
        ("kvq2", 64, 46),
        ("kvq4", 64, 73),
        ("kvq2", 128, 88),
        ("kvq4", 128, 142),
    ],
)
def test_bytes_per_token_and_head(name: str, head_dim: int, bytes_per_token: int) -> None:
    """hack2 at head_dim 128: 80 bytes against 512; HACK's own pages add 4 of code sums."""
    assert PageLayout(get_format(name), head_dim, 1).bytes_per_token == bytes_per_token


def test_a_new_mix_of_bits_is_a_table_row() -> None:
    mixed = ScalarFormat("k8v4", Coding(8, "channel"), Coding(4), help="test", source="test")
    layout = PageLayout(mixed, 64, 1)
    assert layout.fields["k_codes"].shape == (PAGE_SIZE, 64)
    assert layout.fields["v_codes"].shape == (32, PAGE_SIZE)


@pytest.mark.parametrize(("head_dim", "size"), [(64, 64), (80, 16), (96, 48), (128, 64), (256, 64)])
def test_partition_size(head_dim: int, size: int) -> None:
    assert partition_size(head_dim) == size


@pytest.mark.parametrize(
    ("head_dim", "order"), [(64, 64), (80, 16), (96, 32), (128, 128), (256, 128)]
)
def test_hadamard_order(head_dim: int, order: int) -> None:
    assert hadamard_order(head_dim) == order
    assert hadamard_order(head_dim, 16) == 16


def test_bad_geometry_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16, got 72"):
        PageLayout(get_format("hack2"), 72, 1)
    with pytest.raises(ValueError, match="divisor of head_dim 80, got 64"):
        PageLayout(get_format("saw4"), 80, 1, hadamard_block=64)
    with pytest.raises(ConfigError, match=r"expected one of bf16, .*kvq2.* got 'hack3'"):
        get_format("hack3")


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("name", format_names())
def test_minima_lie_right_behind_the_scales(name: str, head_dim: int) -> None:
    fields = PageLayout(get_format(name), head_dim, 2).fields
    for prefix in ("k", "v"):
        if f"{prefix}_scales" in fields:
            scales = fields[f"{prefix}_scales"]
            end = scales.offset_bytes + scales.size_bytes
            assert fields[f"{prefix}_mins"].offset_bytes == end
