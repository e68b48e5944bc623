"""Bases from second moments of Q, K and V: where an error costs most, and where values vary most.

A score is off by q e for an error e of a key, so errors count by Sigma_Q = E[q^T q]. In the basis
k -> k Sigma_Q^(1/2) U they count alike; with U the eigenvectors of the keys' covariance there,
channels come in the order of how much bits gain (transform coding). For V, W_O's Gram matrix takes
the place of Sigma_Q, and a Hadamard matrix follows, after which channels vary alike and one scale
a token fits them all.

Source: OSCAR (arXiv 2605.17757) rotates by eigenvectors of Sigma_Q and by a Hadamard matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgl_kvq.config import PAGE_SIZE
from sgl_kvq.formats.base import hadamard_order
from sgl_kvq.kernels.basis import LayerBasis
from sgl_kvq.kernels.hadamard import rotate

MIN_EIGENVALUE = 1e-6
"""Of an importance, relative to its largest: bounds the condition of a basis at 1,000."""


@dataclass
class Moments:
    """Sums over tokens, float64 [num_kv_heads, head_dim, head_dim].

    Args:
        q: Of queries, all those of a KV head.
        k: Of keys less the mean of their page and channel, which a page's minimum holds anyway.
        v: Of values.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def add(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add a text.

        Args:
            q: [num_qo_heads, tokens, head_dim], after RoPE.
            k: [num_kv_heads, tokens, head_dim], full pages; the first, with its outliers that stay
                in 16 bits, is left out.
            v: Like k.
        """
        pages = k[:, PAGE_SIZE:].double().unflatten(1, (-1, PAGE_SIZE))
        varying = (pages - pages.mean(2, keepdim=True)).flatten(1, 2)
        queries = q.double().reshape(len(k), -1, k.shape[2])
        values = v.double()
        for total, x in ((self.q, queries), (self.k, varying), (self.v, values)):
            total += x.transpose(1, 2) @ x


def fit_basis(moments: Moments, out_gram: torch.Tensor) -> LayerBasis:
    """Compute the basis of a layer.

    Args:
        moments: Of its heads.
        out_gram: float64 [num_kv_heads, head_dim, head_dim], what an error in V costs.
    """
    k = _importance_eigenbasis(moments.q, moments.k)
    v = _importance_eigenbasis(out_gram, moments.v)
    return LayerBasis(k.float(), rotate(v, hadamard_order(v.shape[-1])).float())


def _importance_eigenbasis(importance: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """importance^(1/2) U, U the eigenvectors of `moment` in that metric, largest first."""
    values, vectors = torch.linalg.eigh(importance)
    values = values.clamp_min(MIN_EIGENVALUE * float(values.max()))
    root = vectors * values.sqrt().unsqueeze(1) @ vectors.transpose(1, 2)
    return root @ torch.linalg.eigh(root @ moment @ root).eigenvectors.flip(-1)
