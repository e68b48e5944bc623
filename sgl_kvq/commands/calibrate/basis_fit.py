"""Bases from moments of K and V: where an error costs most, and where rows vary most.

An error e of a stored row changes the model's answer by a KL divergence of e M e^T / 2 (to second
order), M the Fisher information of such rows: E[g^T g], g the gradient of an answer's
log-probability. In the basis k -> k M^(1/2) U errors count alike in every channel; with U the
eigenvectors of K's covariance there, channels come in the order of how much bits gain (transform
coding).

V's channels share one scale a token, so there each is divided by the fourth root of its variance:
with equal steps, the sum of what the channels' errors cost is least where cost and variance
balance (Cauchy-Schwarz). A Hadamard matrix follows, after which channels vary alike.

Source: OSCAR (arXiv 2605.17757) rotates by eigenvectors of E[q^T q] and by a Hadamard matrix;
Fisher information as the cost of an error in a key or value is KVQuant's (arXiv 2401.18079,
section 3.3), there for single numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgl_kvq.formats.base import PAGE_SIZE, hadamard_order
from sgl_kvq.formats.calibration import LayerBasis
from sgl_kvq.formats.hadamard import rotate

MIN_EIGENVALUE = 1e-6
"""Smallest eigenvalue of an importance, relative to its largest: a basis has condition <= 1,000."""


@dataclass
class Moments:
    """Sums over tokens, float64 [num_kv_heads, head_dim, head_dim].

    Args:
        k: Moments of keys less the mean of their page and channel, which a page's minimum holds.
        v: Moments of values.
        k_cost: Moments of gradients with respect to stored keys.
        v_cost: Moments of gradients with respect to stored values.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_cost: torch.Tensor
    v_cost: torch.Tensor

    def cpu(self) -> Moments:
        """The same on the CPU."""
        return Moments(*(total.cpu() for total in vars(self).values()))

    def add_rows(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add a text.

        Args:
            k: [num_kv_heads, tokens, head_dim] after RoPE, full pages; the first, with its
                outliers that stay in 16 bits, is left out here and of gradients.
            v: Like k.
        """
        pages = k[:, PAGE_SIZE:].double().unflatten(1, (-1, PAGE_SIZE))
        _add_moment(self.k, (pages - pages.mean(2, keepdim=True)).flatten(1, 2))
        _add_moment(self.v, v[:, PAGE_SIZE:].double())

    def add_gradients(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add gradients of a text's answers with respect to its rows, shaped like these."""
        _add_moment(self.k_cost, k[:, PAGE_SIZE:].double())
        _add_moment(self.v_cost, v[:, PAGE_SIZE:].double())


def _add_moment(total: torch.Tensor, x: torch.Tensor) -> None:
    total += x.transpose(1, 2) @ x


def fit_basis(moments: Moments) -> LayerBasis:
    """Compute the basis of a layer from the moments of its heads."""
    k, _ = _importance_eigenbasis(moments.k_cost, moments.k)
    v, variances = _importance_eigenbasis(moments.v_cost, moments.v)
    floor = MIN_EIGENVALUE * variances.amax(-1, keepdim=True)
    v = v / variances.maximum(floor).sqrt().sqrt().unsqueeze(1)
    v = rotate(v, hadamard_order(v.shape[-1]))
    return LayerBasis(_rescaled(k, moments.k).float(), _rescaled(v, moments.v).float())


def _importance_eigenbasis(
    importance: torch.Tensor, moment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """importance^(1/2) U, U the eigenvectors of `moment` in that metric, and their eigenvalues."""
    values, vectors = torch.linalg.eigh(importance)
    values = values.maximum(MIN_EIGENVALUE * values.amax(-1, keepdim=True))
    root = vectors * values.sqrt().unsqueeze(1) @ vectors.transpose(1, 2)
    variances, directions = torch.linalg.eigh(root @ moment @ root)
    return root @ directions.flip(-1), variances.flip(-1)


def _rescaled(basis: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Scale each head's basis so that rows keep their mean square: 16-bit rows must hold them."""
    changed = basis.transpose(1, 2) @ moment @ basis
    factor = moment.diagonal(0, 1, 2).sum(1) / changed.diagonal(0, 1, 2).sum(1)
    return basis * factor.sqrt().view(-1, 1, 1)
