"""Which member of the kvq family loses least within a number of bits, from calibration's moments.

An error e of a row costs e M e^T / 2 nats (see `basis_fit`), so a coding that leaves the share d of
a channel's variance costs d * variance * M / 2 there. M and the variances are measured on text, d
on normal numbers with the coding itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from sgl_kvq.commands.basis_fit import Moments
from sgl_kvq.config import PAGE_SIZE
from sgl_kvq.errors import ConfigError
from sgl_kvq.formats.base import FINE_BITS
from sgl_kvq.formats.kvq import kvq_format
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.kernels.append.reference import quantize_groups
from sgl_kvq.kernels.basis import KvqBits, LayerBasis

CHOICES = tuple(KvqBits(k, boosted, v) for k in (2, 4) for boosted in range(9) for v in (2, 4))


@dataclass(frozen=True)
class Choice:
    """A member of the family and what it is predicted to cost.

    Args:
        bits: Its codings.
        bits_per_element: Stored, all metadata of a page included.
        kl: Predicted KL divergence from 16 bits, nats a token; right to a factor, and in order.
        by_layer: The part of each layer.
    """

    bits: KvqBits
    bits_per_element: float
    kl: float
    by_layer: list[float]


def choose_bits(
    budget_bits: float, moments: list[Moments], bases: list[LayerBasis], num_tokens: int
) -> Choice:
    """Choose the codings with the least predicted cost.

    Args:
        budget_bits: Most bits per element, all metadata included.
        moments: Of each layer.
        bases: Fitted to them.
        num_tokens: Tokens the moments are sums over.

    Raises:
        ConfigError: even the smallest member takes more.
    """
    head_dim = bases[0].k.shape[-1]
    sizes = {bits: bits_per_element(bits, head_dim) for bits in CHOICES}
    fitting = [bits for bits in CHOICES if sizes[bits] <= budget_bits]
    if not fitting:
        raise ConfigError(
            f"--budget-bits: expected at least {min(sizes.values())} with head_dim {head_dim}, "
            f"got {budget_bits}"
        )
    spreads = [_spread(*pair) for pair in zip(moments, bases, strict=True)]

    def predict(bits: KvqBits) -> Choice:
        parts = [_cost(bits, spread) / num_tokens**2 for spread in spreads]
        return Choice(bits, sizes[bits], sum(parts), parts)

    return min(map(predict, fitting), key=lambda choice: (choice.kl, choice.bits_per_element))


def bits_per_element(bits: KvqBits, head_dim: int) -> float:
    """Bits a stored number takes, all metadata of its page included."""
    layout = PageLayout(kvq_format("kvq", *bits), head_dim, 1)
    return 16 * layout.page_bytes / layout.row_page_bytes


@dataclass(frozen=True)
class _Spread:
    """What a layer's channels cost in its basis, each float64 [num_kv_heads, head_dim].

    Args:
        k: Variance of a key channel times the cost of an error there.
        v: Likewise, each value channel with the mean variance: they share a step.
    """

    k: torch.Tensor
    v: torch.Tensor


def _spread(moments: Moments, basis: LayerBasis) -> _Spread:
    (k_variance, k_cost), (v_variance, v_cost) = (
        _in_basis(matrix.double(), moment, cost)
        for matrix, moment, cost in (
            (basis.k, moments.k, moments.k_cost),
            (basis.v, moments.v, moments.v_cost),
        )
    )
    return _Spread(k_variance * k_cost, v_variance.mean(-1, keepdim=True) * v_cost)


def _in_basis(
    basis: torch.Tensor, moment: torch.Tensor, cost: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Variances and costs of channels, [num_kv_heads, head_dim] each."""
    back = torch.linalg.inv(basis)
    variance = (basis.transpose(1, 2) @ moment @ basis).diagonal(0, 1, 2)
    return variance, (back @ cost @ back.transpose(1, 2)).diagonal(0, 1, 2)


def _cost(bits: KvqBits, spread: _Spread) -> float:
    """Half the sum of squared errors, each by its cost."""
    head_dim = spread.k.shape[1]
    coding = kvq_format("kvq", *bits)
    boosted = coding.k.num_boosted(head_dim)
    k = spread.k[:, :boosted].sum() * left_over(bits.k + FINE_BITS, PAGE_SIZE)
    k += spread.k[:, boosted:].sum() * left_over(bits.k, PAGE_SIZE)
    return 0.5 * float(k + spread.v.sum() * left_over(bits.v, head_dim))


@lru_cache
def left_over(num_bits: int, group_size: int) -> float:
    """Share of the variance of normal numbers that a fitted coding leaves as squared error."""
    x = torch.randn(4096, group_size, generator=torch.Generator().manual_seed(0))
    coding = kvq_format("kvq", 2, 0, 2).v
    codes, scales, mins = quantize_groups(x, coding, -1, max_code=2**num_bits - 1)
    return float((codes * scales.float() + mins.float() - x).square().mean())
