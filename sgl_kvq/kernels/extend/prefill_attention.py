"""16-bit attention of an extend step's passes, which a library computes."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch

from sgl_kvq.kernels.extend.passes import AttentionPass


class AttentionShape(NamedTuple):
    """Heads and numbers of an attention layer.

    Args:
        num_qo_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Channels of a head; one of `PREFILL_HEAD_DIMS`.
        dtype: Of q, k and v, 16 bits.
        sm_scale: Factor on the scores.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    sm_scale: float


class PrefillAttention(Protocol):
    """Attention in 16 bits over keys in the scratch buffer."""

    def plan(self, passes: list[AttentionPass]) -> None:
        """Prepare the passes of a forward; page tables stay on the host until here."""

    def run(
        self,
        index: int,
        step: AttentionPass,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        """Attend: pass number `index`.

        Args:
            index: Position of the pass in the plan.
            step: The pass.
            q: [tokens, num_qo_heads, head_dim], rows of the pass.
            k: [scratch tokens, num_kv_heads, head_dim].
            v: Like k.
            out: Like q, written.
            lse: float32 [tokens, num_qo_heads] in log base 2, written; None if nobody needs it.
        """


@runtime_checkable
class CapturableAttention(PrefillAttention, Protocol):
    """A `PrefillAttention` whose calls a CUDA graph may hold; replays read the lengths anew."""

    def plan_capture(self, max_sequences: int, max_queries: int, max_keys: int) -> None:
        """Prepare one causal pass to be captured.

        Args:
            max_sequences: Sequences of a batch.
            max_queries: Tokens of a batch.
            max_keys: Keys of a batch.
        """

    def plan_replay(self, step: AttentionPass) -> None:
        """Bring the lengths of a pass to where captured calls read them.

        `run` attends to the pass as well: a step may fit the graphs and still be run outside.
        """


class MakePrefillAttention(Protocol):
    """Chooses what computes the passes."""

    def __call__(self, shape: AttentionShape, device: torch.device | str) -> PrefillAttention:
        """Prepare it for layers of one shape."""
