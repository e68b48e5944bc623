"""The attention backend on a CPU: the PyTorch reference kernels."""

from __future__ import annotations

from typing import Any

import torch

from sgl_kvq.attention.cpu_threads import SMALL_STEP, one_thread_if
from sgl_kvq.attention.plan.cpu import (
    DecodeMetadata,
    ExtendMetadata,
    decode_metadata,
    extend_metadata,
)
from sgl_kvq.host.attention import KvqAttnBackend
from sgl_kvq.kernels.append.cpu import append_decode, append_extend
from sgl_kvq.kernels.decode.reference import Arithmetic, decode
from sgl_kvq.kernels.extend.reference import extend


class TorchAttnBackend(KvqAttnBackend):
    """Attention with the reference kernels; see `KvqAttnBackend`."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        # A left factor in float32 is exact, and on a CPU faster than one rounded to 8 bits (8
        # requests of 2,048 tokens, 2-core Xeon: 11.6 against 15.5 ms).
        self.arithmetic: Arithmetic = "dequantize"
        self.forward_metadata: DecodeMetadata | ExtendMetadata | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Make the index tensors of a forward; see `AttentionBackend`."""
        self.refuse_mode(forward_batch)
        mode = forward_batch.forward_mode
        if mode.is_idle():
            self.forward_metadata = None
        elif mode.is_decode():
            self.forward_metadata = decode_metadata(forward_batch, self.req_to_token, self.pool)
        else:
            self.forward_metadata = extend_metadata(
                forward_batch, self.req_to_token, self.pool, self.config.quantized_prefill
            )

    def attend_decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any
    ) -> torch.Tensor:
        """See `KvqAttnBackend`."""
        metadata = self.forward_metadata
        assert isinstance(metadata, DecodeMetadata)
        cache, layout = self.pool.layer(layer.layer_id), self.pool.layout_of(layer.layer_id)
        size = len(metadata.plan.pages) * layout.num_kv_heads * layout.head_dim
        with one_thread_if(size <= SMALL_STEP):
            self.pool.num_contained += append_decode(cache, layout, k, v, metadata.append)
            out, _ = decode(q, cache, metadata.plan, layout, layer.scaling, self.arithmetic)
        return out

    def attend_extend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any
    ) -> torch.Tensor:
        """See `KvqAttnBackend`."""
        metadata = self.forward_metadata
        assert isinstance(metadata, ExtendMetadata)
        cache, layout = self.pool.layer(layer.layer_id), self.pool.layout_of(layer.layer_id)
        rows, num_contained = append_extend(cache, layout, k, v, metadata.append)
        self.pool.num_contained += num_contained
        out = extend(
            q,
            cache.pages,
            rows,
            cache.sink_rows,
            metadata.requests,
            layout,
            layer.scaling,
            self.config.quantized_prefill,
        )
        return out

    def support_triton(self) -> bool:
        """Triton does not run on a CPU."""
        return False
