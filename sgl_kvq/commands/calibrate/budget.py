"""Choose the codings that lose least within a number of bits, layer by layer.

An error e of a row costs e M e^T / 2 nats (see `basis_fit`), so a coding of relative squared error
d costs d * variance * M / 2 in a channel. M and the variances are calibration's moments, d is
measured on normal numbers with the coding itself.

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
from sgl_kvq.formats.base import EXTRA_BITS, PAGE_SIZE, Coding, QuantFormat
from sgl_kvq.formats.calibration import BitAllocation, LayerBasis
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.quantize import quantize_groups
from sgl_kvq.formats.registry import calibrated_formats

COARSE_WEIGHT, EXTRA_WEIGHT = 4.0, 1.5
"""Factors on the predicted cost of errors in K: of 2-bit codes in the leading half of the channels,
and of others. Softmax amplifies large errors (SmolLM2-135M: extra bits for 4 more channels gain 3.5
to 4.8 times the prediction at 2 bits, 1.0 to 1.6 times at 4; V costs 0.8 to 1.1 times its own)."""


@dataclass(frozen=True)
class Choice:
    """Bits of a model's layers and the loss predicted for them.

    Args:
        allocation: Bits of each layer.
        bits_per_element: Bits of a stored number, all metadata of pages included; mean over layers.
        costs: Predicted KL divergence of each layer, nats a token; accurate up to scale,
            rank-preserving.
    """

    allocation: BitAllocation
    bits_per_element: float
    costs: list[float]


def choose_bits(
    budget_bits: float, moments: list[Moments], bases: list[LayerBasis], num_tokens: int
) -> Choice:
    """Choose the codings with the least predicted cost.

    They are candidates of the calibrated format whose own size is nearest to the budget.

    Args:
        budget_bits: Most bits per element, mean over layers, all metadata included.
        moments: Moments of each layer.
        bases: Bases fitted to them.
        num_tokens: Tokens the moments are sums over.

    Raises:
        ConfigError: even the smallest coding takes more.
    """
    head_dim = bases[0].k.shape[-1]
    largest_first = sorted(calibrated_formats(), key=lambda x: -bits_per_element(x, head_dim))
    named = min(largest_first, key=lambda x: abs(bits_per_element(x, head_dim) - budget_bits))
    candidates = candidate_formats(named)
    sizes = torch.tensor([bits_per_element(candidate, head_dim) for candidate in candidates])
    if budget_bits < sizes.min():
        raise ConfigError(
            f"--budget-bits: expected at least {sizes.min():g} with head_dim {head_dim}, "
            f"got {budget_bits:g}"
        )
    costs = torch.tensor(
        [
            [_cost(candidate, spread) / num_tokens**2 for candidate in candidates]
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
    return Choice(
        BitAllocation(named.name, [candidates[i].bits for i in best.tolist()]),
        float(sizes[best].mean()),
        costs.gather(1, best[:, None]).flatten().tolist(),
    )


def _pick(
    costs: torch.Tensor, sizes: torch.Tensor, smaller: int, larger: int, budget_bits: float
) -> torch.Tensor:
    """Give as many layers as fit the larger coding, those that gain most; int64 [layers]."""
    num_layers = len(costs)
    room, step = budget_bits - sizes[smaller], sizes[larger] - sizes[smaller]
    often = num_layers if step <= room else int(room * num_layers / step)
    gain = costs[:, smaller] - costs[:, larger]
    pick = torch.full((num_layers,), smaller)
    pick[gain.argsort(descending=True)[:often]] = larger
    return torch.where(gain > 0, pick, smaller)


def bits_per_element(quant_format: QuantFormat, head_dim: int) -> float:
    """Bits of a stored number, all metadata of its page included."""
    return PageLayout(quant_format, head_dim, 1).bits_per_element


def candidate_formats(named: QuantFormat) -> list[QuantFormat]:
    """Formats that a layer may get instead of a calibrated one."""
    assert named.calibration is not None
    return [named.calibration.with_bits(named.name, bits) for bits in named.calibration.candidates]


@dataclass(frozen=True)
class _Spread:
    """Variances of a layer's channels in its basis, weighted by the cost of errors there.

    Args:
        k: float64 [num_kv_heads, head_dim], keys.
        v: float64 like k, values; each channel has the mean variance, since they share a step.
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


def _cost(candidate: QuantFormat, spread: _Spread) -> float:
    """Half the weighted sum of squared errors that a coding is expected to leave."""
    head_dim = spread.k.shape[1]
    outliers, k_bits = candidate.k.num_outliers(head_dim), candidate.k.num_bits
    channel = torch.arange(head_dim)
    coarse = (channel >= outliers) & (channel < head_dim // 2) & (k_bits == 2)
    weight = torch.where(coarse, COARSE_WEIGHT, EXTRA_WEIGHT).double()
    weight[:outliers] *= relative_mse(k_bits + EXTRA_BITS, False, PAGE_SIZE)
    weight[outliers:] *= relative_mse(k_bits, candidate.k.nested, PAGE_SIZE)
    k = (spread.k * weight).sum()
    v_mse = relative_mse(candidate.v.num_bits, candidate.v.nested, head_dim)
    return 0.5 * float(k + spread.v.sum() * v_mse)


@lru_cache
def relative_mse(num_bits: int, nested: bool, group_size: int) -> float:
    """Mean squared error of a coding on normal numbers, relative to their variance.

    Args:
        num_bits: Bits of a code, 1 to 8.
        nested: Whether codes are nested, as `Coding` says.
        group_size: Numbers that share a scale.
    """
    x = torch.randn(4096, group_size, generator=torch.Generator().manual_seed(0))
    coding = Coding(num_bits, nested=True) if nested else Coding(8)
    codes, scales, mins = quantize_groups(x, coding, -1, max_code=2**num_bits - 1)
    return float((codes * scales.float() + mins.float() - x).square().mean())
