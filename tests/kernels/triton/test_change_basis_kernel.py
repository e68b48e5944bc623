from __future__ import annotations

import pytest
import torch

from sgl_kvq.formats import calibration as basis
from sgl_kvq.kernels.change_basis.api import change_basis, change_qkv

KV_HEADS = 2


def heads(tokens: int, count: int, head_dim: int, seed: int, device: str) -> torch.Tensor:
    """Strided rows, as a fused projection returns them."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(tokens, count + 1, head_dim, generator=generator)
    return wide.bfloat16().to(device)[:, 1:]


def matrices(head_dim: int, seed: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(KV_HEADS, head_dim, head_dim, generator=generator).to(device)


def close(found: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor) -> bool:
    expected = basis.change_basis(x.cpu().double(), matrix.cpu())
    error = (found.cpu().double() - expected).norm() / expected.norm()
    return found.is_contiguous() and bool(error < 4e-3)  # bfloat16, under the interpreter truncated


@pytest.mark.parametrize(
    ("tokens", "group", "head_dim"),
    [(1, 4, 128), (5, 3, 64), (9, 1, 80), (200, 3, 96), (3, 2, 256)],
)
def test_against_the_reference(tokens: int, group: int, head_dim: int, device: str) -> None:
    counts = (KV_HEADS * group, KV_HEADS, KV_HEADS)
    qkv = tuple(heads(tokens, n, head_dim, seed, device) for seed, n in enumerate(counts))
    own = tuple(matrices(head_dim, 10 + seed, device) for seed in range(3))
    for found, x, matrix in zip(change_qkv(qkv, own), qkv, own, strict=True):
        assert close(found, x, matrix)
    assert close(change_basis(qkv[0], own[2]), qkv[0], own[2])
