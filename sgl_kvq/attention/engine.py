"""What runs the attention of a step: one engine a kind of device."""

from __future__ import annotations

from typing import Protocol

import torch

from sgl_kvq.attention.layer import LayerSpec
from sgl_kvq.attention.step import StepInput


class AttentionEngine(Protocol):
    """Attention over a `PagedStore`. Every step is planned once, then run in every layer.

    Attributes:
        quantized_prefill: Queries of an extend step read all closed pages in codes; counts from the
            next `plan` on.
    """

    quantized_prefill: bool

    def reserve(self, max_batch: int) -> None:
        """Make room for decode batches of up to `max_batch` requests.

        Note: buffers may move, so that CUDA graphs captured before are no longer valid.
        """

    def plan(self, step: StepInput) -> None:
        """Prepare a step. All tables are read here: they may change as soon as this returns."""

    def decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: LayerSpec
    ) -> torch.Tensor:
        """Append one row a request and attend.

        Args:
            q: [batch, num_qo_heads, head_dim], after RoPE.
            k: [batch, num_kv_heads, head_dim], likewise.
            v: Like k.
            layer: Which layer; layers are called in order.

        Returns:
            Like q.
        """

    def extend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: LayerSpec
    ) -> torch.Tensor:
        """Append fresh rows and attend.

        Args:
            q: [tokens, num_qo_heads, head_dim], after RoPE, requests one after the other.
            k: [tokens, num_kv_heads, head_dim], likewise.
            v: Like k.
            layer: Which layer; layers are called in order.

        Returns:
            Like q.
        """
