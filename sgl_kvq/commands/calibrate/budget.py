"""Which codings lose least within a number of bits, layer by layer, from calibration's moments.

An error e of a row costs e M e^T / 2 nats (see `basis_fit`), so a coding that leaves the share d of
a channel's variance costs d * variance * M / 2 there. M and the variances are measured on text, d
on normal numbers with the coding itself.

A model gets at most two codings: each is a kernel of its own, and a third would gain little
(SmolLM2-135M at 4.5625 bits: one 0.0024 nats predicted, two 0.0014, any number 0.0014).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement

import torch

from sgl_kvq.commands.calibrate.basis_fit import Moments
from sgl_kvq.errors import ConfigError
from sgl_kvq.formats.base import EXTRA_BITS, PAGE_SIZE
from sgl_kvq.formats.calibration import Chosen, KvqBits, LayerBasis
from sgl_kvq.formats.kvq import kvq_format
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.quantize import quantize_groups
from sgl_kvq.formats.registry import get_format

CANDIDATES = tuple(KvqBits(k, outliers, v) for k in (2, 4) for outliers in range(9) for v in (2, 4))

COARSE_WEIGHT, EXTRA_WEIGHT = 4.0, 1.5
"""What errors in K cost against their prediction: those of 2-bit codes in the leading half of the
channels, and others. The exponential makes more of large errors (SmolLM2-135M: extra bits for 4
more channels gain 3.5 to 4.8 times the prediction at 2 bits, 1.0 to 1.6 times at 4; V costs 0.8 to
1.1)."""


@dataclass(frozen=True)
class Choice:
    """Codings of a model and what they are predicted to cost.

    Args:
        chosen: Codings of each layer.
        bits_per_element: Stored, all metadata of pages included.
        costs: Of each layer, nats a token; right to a factor, and in order.
    """

    chosen: Chosen
    bits_per_element: float
    costs: list[float]


def choose_bits(
    budget_bits: float, moments: list[Moments], bases: list[LayerBasis], num_tokens: int
) -> Choice:
    """Choose the codings with the least predicted cost.

    Args:
        budget_bits: Most bits per element, mean over layers, all metadata included.
        moments: Of each layer.
        bases: Fitted to them.
        num_tokens: Tokens the moments are sums over.

    Raises:
        ConfigError: even the smallest coding takes more.
    """
    head_dim = bases[0].k.shape[-1]
    sizes = torch.tensor([bits_per_element(bits, head_dim) for bits in CANDIDATES])
    if budget_bits < sizes.min():
        raise ConfigError(
            f"--budget-bits: expected at least {sizes.min():g} with head_dim {head_dim}, "
            f"got {budget_bits:g}"
        )
    costs = torch.tensor(
        [
            [_cost(bits, spread) / num_tokens**2 for bits in CANDIDATES]
            for spread in (_spread(*pair) for pair in zip(moments, bases, strict=True))
        ],
        dtype=torch.float64,
    )
    pairs = combinations_with_replacement(sizes.argsort(stable=True).tolist(), 2)
    picks = [
        _pick(costs, sizes, smaller, larger, budget_bits)
        for smaller, larger in pairs
        if sizes[smaller] <= budget_bits
    ]
    total = torch.stack([costs.gather(1, pick[:, None]).sum() for pick in picks])
    best = picks[int(total.argmin())]
    layers = [CANDIDATES[i] for i in best.tolist()]
    size = float(sizes[best].mean())
    halfway = sum(bits_per_element(named_bits(name), head_dim) for name in ("kvq2", "kvq4")) / 2
    return Choice(
        Chosen("kvq2" if budget_bits < halfway else "kvq4", layers),
        size,
        costs.gather(1, best[:, None]).flatten().tolist(),
    )


def _pick(
    costs: torch.Tensor, sizes: torch.Tensor, smaller: int, larger: int, budget_bits: float
) -> torch.Tensor:
    """The larger coding where it gains most, as often as fits; int64 [layers]."""
    num_layers = len(costs)
    room, step = budget_bits - sizes[smaller], sizes[larger] - sizes[smaller]
    often = num_layers if step <= room else int(room * num_layers / step)
    gain = costs[:, smaller] - costs[:, larger]
    pick = torch.full((num_layers,), smaller)
    pick[gain.argsort(descending=True)[:often]] = larger
    return torch.where(gain > 0, pick, smaller)


def bits_per_element(bits: KvqBits, head_dim: int) -> float:
    """Bits a stored number takes, all metadata of its page included."""
    layout = PageLayout(kvq_format("kvq", *bits), head_dim, 1)
    return 16 * layout.page_bytes / layout.row_page_bytes


def named_bits(name: str) -> KvqBits:
    """Codings that `kvq2` or `kvq4` have without a choice."""
    named = get_format(name)
    return KvqBits(named.k.num_bits, named.k.outlier_16ths, named.v.num_bits)


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
    outliers = kvq_format("kvq", *bits).k.num_outliers(head_dim)
    channel = torch.arange(head_dim)
    coarse = (channel >= outliers) & (channel < head_dim // 2) & (bits.k == 2)
    weight = torch.where(coarse, COARSE_WEIGHT, EXTRA_WEIGHT).double()
    weight[:outliers] *= left_over(bits.k + EXTRA_BITS, PAGE_SIZE)
    weight[outliers:] *= left_over(bits.k, PAGE_SIZE)
    k = (spread.k * weight).sum()
    return 0.5 * float(k + spread.v.sum() * left_over(bits.v, head_dim))


@lru_cache
def left_over(num_bits: int, group_size: int) -> float:
    """Share of the variance of normal numbers that a coding of the family leaves as error."""
    x = torch.randn(4096, group_size, generator=torch.Generator().manual_seed(0))
    coding = kvq_format("kvq", 2, 0, 2 if num_bits == 2 else 4).v  # fitted, or not
    codes, scales, mins = quantize_groups(x, coding, -1, max_code=2**num_bits - 1)
    return float((codes * scales.float() + mins.float() - x).square().mean())
