"""What an engine must know of an attention layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgl_kvq.formats.page_layout import PageLayout


@dataclass(frozen=True)
class HeadBasis:
    """Change of basis of this rank's heads in one layer, see `sgl_kvq.formats.calibration`.

    Args:
        q: float32 [num_kv_heads, head_dim, head_dim] on the device, applied to queries.
        k: Likewise, applied to keys before they are stored.
        v: Likewise, applied to values.
        out: Likewise, applied to outputs: back from the basis of V.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor


@dataclass(frozen=True)
class LayerSpec:
    """One attention layer of this rank.

    Args:
        layer_id: Its number in the model.
        layout: Layout of its pages.
        num_qo_heads: Query heads of this rank.
        sm_scale: Factor on the scores.
        basis: Basis its rows are stored in; None: that of the model.
    """

    layer_id: int
    layout: PageLayout
    num_qo_heads: int
    sm_scale: float
    basis: HeadBasis | None
