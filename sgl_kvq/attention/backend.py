"""The attention backend `kvq`: appends fresh rows, attends to pages of codes."""

from __future__ import annotations

from typing import Any

import torch

from sgl_kvq.attention.cpu_threads import SMALL_STEP, one_thread_if
from sgl_kvq.attention.metadata import (
    DecodeMetadata,
    ExtendMetadata,
    decode_metadata,
    extend_metadata,
)
from sgl_kvq.attention.support import check_layers
from sgl_kvq.errors import HostError, KvqError
from sgl_kvq.host import AttentionBackend
from sgl_kvq.kernels.append.store import append_decode, append_extend
from sgl_kvq.kernels.decode.reference import decode
from sgl_kvq.kernels.extend.reference import extend
from sgl_kvq.memory_pool.quantized_pool import QuantizedKVPool
from sgl_kvq.server_args import quant_config


class KvqAttnBackend(AttentionBackend):
    """Attention over a `QuantizedKVPool`, on any device PyTorch has.

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
        check_layers(runner.model)
        self.pool = runner.token_to_kv_pool
        self.layout = self.pool.layout
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.quantized_prefill = config.quantized_prefill
        # "quantized" prefill promises that decode and extend compute the same function, which the
        # 8-bit left factors of integer arithmetic would break. On a CPU a float left factor is
        # exact and faster too (8 requests of 2,048 tokens, 2-core Xeon: 11.6 against 15.5 ms).
        use_float = config.quantized_prefill or self.pool.device == "cpu"
        self.arithmetic = "dequantize" if use_float else self.layout.format.arithmetic
        self.forward_metadata: DecodeMetadata | ExtendMetadata | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Make the index tensors of a forward; see `AttentionBackend`."""
        mode = forward_batch.forward_mode
        if mode.is_idle():
            self.forward_metadata = None
        elif mode.is_decode():
            self.forward_metadata = decode_metadata(forward_batch, self.req_to_token, self.pool)
        elif mode.is_extend() and forward_batch.spec_info is None:
            self.forward_metadata = extend_metadata(
                forward_batch, self.req_to_token, self.pool, self.quantized_prefill
            )
        else:
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
        q, k, v = self._split_heads(q, k, v, layer, save_kv_cache, kwargs)
        metadata = self.forward_metadata
        assert isinstance(metadata, DecodeMetadata)
        cache = self.pool.layer(layer.layer_id)
        size = len(metadata.plan.pages) * self.layout.num_kv_heads * self.layout.head_dim
        with one_thread_if(self.pool.device == "cpu" and size <= SMALL_STEP):
            self.pool.num_contained += append_decode(cache, self.layout, k, v, metadata.append)
            out, _ = decode(q, cache, metadata.plan, self.layout, layer.scaling, self.arithmetic)
        return out.flatten(1)

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
        q, k, v = self._split_heads(q, k, v, layer, save_kv_cache, kwargs)
        metadata = self.forward_metadata
        assert isinstance(metadata, ExtendMetadata)
        cache = self.pool.layer(layer.layer_id)
        rows, num_contained = append_extend(cache, self.layout, k, v, metadata.append)
        self.pool.num_contained += num_contained
        out = extend(
            q,
            cache.pages,
            rows,
            cache.sink_rows,
            metadata.requests,
            self.layout,
            layer.scaling,
            self.quantized_prefill,
        )
        return out.flatten(1)

    def _split_heads(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        save_kv_cache: bool,
        extra: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """View q, k, v as [tokens, heads, head_dim]; refuse calls whose KV we would get wrong.

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
        return (
            q.view(-1, layer.tp_q_head_num, head_dim),
            k.view(-1, layer.tp_k_head_num, head_dim),
            v.view(-1, layer.tp_k_head_num, head_dim),
        )

    def support_triton(self) -> bool:
        """Whether Triton can run beside this backend."""
        return bool(self.pool.device != "cpu")
