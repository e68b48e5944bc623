"""The attention backend `kvq`: appends fresh rows, attends to pages of codes."""

from __future__ import annotations

from typing import Any

import torch

from sgl_kvq.errors import HostError, KvqError
from sgl_kvq.formats.calibration import change_basis
from sgl_kvq.host.names import AttentionBackend
from sgl_kvq.host.pool import QuantizedKVPool
from sgl_kvq.host.rank_basis import RankBasis, rank_bases
from sgl_kvq.host.server_args import quant_config
from sgl_kvq.host.support import check_layers


class KvqAttnBackend(AttentionBackend):
    """Attention over a `QuantizedKVPool`; a subclass says with which kernels.

    Args:
        runner: SGLang's `ModelRunner`, with model and pools in place.

    Raises:
        HostError: the pool is not ours, so a hook was not live.
        ConfigError: a layer of the model needs what this backend does not do.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__()
        config = quant_config(runner.server_args)
        if config is None or not isinstance(runner.token_to_kv_pool, QuantizedKVPool):
            raise HostError(
                "attention backend kvq: expected a quantized pool, got "
                f"{type(runner.token_to_kv_pool).__name__}; start the server with --kv-quant"
            )
        self.layers = check_layers(runner.model)
        self.config = config
        self.pool = runner.token_to_kv_pool.store
        self.layout = self.pool.layout
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.bases = rank_bases(runner, config, self.layout)

    def refuse_mode(self, forward_batch: Any) -> None:
        """Refuse a forward that is neither decode nor plain extend.

        Raises:
            KvqError: names the mode.
        """
        mode = forward_batch.forward_mode
        if not mode.is_decode_or_idle() and (
            not mode.is_extend() or forward_batch.spec_info is not None
        ):
            raise KvqError(f"attention backend kvq: forward mode {mode.name} is not supported")

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Append one row a request and attend; see `AttentionBackend`.

        Returns:
            [batch, num_qo_heads * head_dim].
        """
        rows = self.split_heads(q, k, v, layer, save_kv_cache, kwargs)
        return self.merge_heads(self.attend_decode(*rows, layer), layer).to(q.dtype)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Append fresh rows and attend; see `AttentionBackend`.

        Returns:
            [tokens, num_qo_heads * head_dim].
        """
        rows = self.split_heads(q, k, v, layer, save_kv_cache, kwargs)
        return self.merge_heads(self.attend_extend(*rows, layer), layer).to(q.dtype)

    def attend_decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any
    ) -> torch.Tensor:
        """Append k and v and attend, all [batch, heads, head_dim]; returns a tensor like q."""
        raise NotImplementedError

    def attend_extend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any
    ) -> torch.Tensor:
        """Append k and v and attend, all [tokens, heads, head_dim]; returns a tensor like q."""
        raise NotImplementedError

    def split_heads(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        save_kv_cache: bool,
        extra: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """View q, k, v as [tokens, heads, head_dim] in the basis of the pages.

        Calls whose KV we would get wrong are refused.

        Raises:
            KvqError: KV of another layer or of no layer, or an argument we do not know.
        """
        unknown = {name for name, value in extra.items() if value is not None}
        if k is None or v is None or not save_kv_cache or unknown:
            raise KvqError(
                f"attention backend kvq: layer {layer.layer_id} shares KV with another layer or "
                f"passes {', '.join(sorted(unknown)) or 'no KV'}, which is not supported; run this "
                f"model without --kv-quant"
            )
        head_dim = self.layout.head_dim
        q = q.view(-1, layer.tp_q_head_num, head_dim)
        k = k.view(-1, layer.tp_k_head_num, head_dim)
        v = v.view(-1, layer.tp_k_head_num, head_dim)
        if not self.bases:
            return q, k, v
        return self.enter_basis((q, k, v), self._basis(layer))

    def merge_heads(self, out: torch.Tensor, layer: Any) -> torch.Tensor:
        """Bring outputs [tokens, heads, head_dim] back to the model's basis, heads side by side."""
        if self.bases:
            out = self.leave_basis(out, self._basis(layer))
        return out.flatten(1)

    def _basis(self, layer: Any) -> RankBasis:
        return self.bases[layer.layer_id - self.pool.start_layer]

    def enter_basis(
        self, qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], basis: RankBasis
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Take q, k, v [tokens, heads, head_dim] to the basis of the pages."""
        q, k, v = qkv
        return change_basis(q, basis.q), change_basis(k, basis.k), change_basis(v, basis.v)

    def leave_basis(self, out: torch.Tensor, basis: RankBasis) -> torch.Tensor:
        """Take outputs [tokens, heads, head_dim] back."""
        return change_basis(out, basis.out)
