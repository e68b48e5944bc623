"""The attention backend `kvq`: SGLang's interface over an attention engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from typing_extensions import override

from sgl_kvq.attention.engine import AttentionEngine
from sgl_kvq.attention.layer import HeadBasis, LayerSpec
from sgl_kvq.attention.step import StepInput, StepMode
from sgl_kvq.attention.warm_up import warm_up
from sgl_kvq.errors import ConfigError, HostError, KvqError
from sgl_kvq.host.names import AttentionBackend
from sgl_kvq.host.options import quant_config
from sgl_kvq.host.pool import QuantizedKVPool
from sgl_kvq.host.rank_basis import rank_bases
from sgl_kvq.host.support import check_layers
from sgl_kvq.host.versions.internals import captures_prefill_graph, prefill_graph_output
from sgl_kvq.memory_pool.store import PagedStore

if TYPE_CHECKING:
    from sgl_kvq.attention.gpu import GpuEngine


class KvqAttnBackend(AttentionBackend):
    """Attention over a `QuantizedKVPool`.

    Args:
        runner: SGLang's `ModelRunner`, with model and pools in place.

    Attributes:
        engine: What computes; one for CPUs, one for GPUs.

    Raises:
        HostError: the pool is not ours, so a hook was not live.
        ConfigError: a layer of the model needs what this backend does not do.
    """

    needs_cpu_seq_lens = False

    def __init__(self, runner: Any) -> None:
        super().__init__()
        config = quant_config(runner.server_args)
        if config is None or not isinstance(runner.token_to_kv_pool, QuantizedKVPool):
            raise HostError(
                "attention backend kvq: expected a quantized pool, got "
                f"{type(runner.token_to_kv_pool).__name__}; start the server with --kv-quant"
            )
        # Models ask the backend for them.
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.req_to_token_pool = runner.req_to_token_pool
        store = runner.token_to_kv_pool.store
        specs = _layer_specs(runner, store, rank_bases(runner, config, store.layout))
        self._layers = {spec.layer_id: spec for spec in specs}
        self._on_gpu = str(store.device).startswith("cuda")
        req_to_token = self.req_to_token_pool.req_to_token
        self.engine = _engine(store, specs, req_to_token, config.quantized_prefill)
        if self._on_gpu:
            max_batch, context = req_to_token.shape
            warm_up(self.engine, specs, max_batch, context, store.device)

    @override
    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        # SGLang lets its scheduler change token tables as soon as this returns, so that all of
        # them are read here, not inside a graph.
        self.engine.plan(step_input(forward_batch))

    @override
    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.engine.reserve(max_bs)

    @override
    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1  # a padding row has one token, in page and slot 0

    @override
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
        spec = self._spec_of(layer)
        rows = _split_heads(q, k, v, spec, save_kv_cache, kwargs)
        return self.engine.decode(*rows, spec).flatten(1).to(q.dtype)

    @override
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
        spec = self._spec_of(layer)
        rows = _split_heads(q, k, v, spec, save_kv_cache, kwargs)
        found = prefill_graph_output(forward_batch)
        if found is None or found.dtype != spec.layout.row_dtype:
            return self.engine.extend(*rows, spec).flatten(1).to(q.dtype)
        engine, out = cast("GpuEngine", self.engine), found.view(rows[0].shape)
        if captures_prefill_graph():
            engine.capture_extend(*rows, spec, out)
        elif not engine.replay_extend(*rows, spec, out, len(forward_batch.input_ids)):
            engine.extend(*rows, spec, out)
        return found

    def _spec_of(self, layer: Any) -> LayerSpec:
        """What was known of a layer (SGLang's `RadixAttention`) at start.

        Raises:
            KvqError: its scores are scaled by another factor now.
        """
        spec = self._layers[layer.layer_id]
        if layer.scaling != spec.sm_scale:
            raise KvqError(
                f"attention backend kvq: layer {layer.layer_id} scales its scores by "
                f"{layer.scaling}, by {spec.sm_scale} when it was built, which is not supported; "
                f"run this model without --kv-quant"
            )
        return spec

    @override
    def support_triton(self) -> bool:
        return self._on_gpu


def _layer_specs(runner: Any, store: PagedStore, bases: list[HeadBasis]) -> list[LayerSpec]:
    """The attention layers of the model, in its order.

    Raises:
        ConfigError: a layer needs what this backend does not do, or its heads are not those of the
            pool.
    """
    specs = []
    for layer in check_layers(runner.model):
        layout = store.layout_of(layer.layer_id)
        heads = (layer.tp_k_head_num, layer.qk_head_dim)
        if heads != (layout.num_kv_heads, layout.head_dim):
            raise ConfigError(
                f"--kv-quant: layer {layer.layer_id} of {type(runner.model).__name__} has "
                f"{heads[0]} KV heads of {heads[1]}, expected {layout.num_kv_heads} of "
                f"{layout.head_dim} as in the model's config; run it without --kv-quant"
            )
        specs.append(
            LayerSpec(
                layer_id=layer.layer_id,
                layout=layout,
                num_qo_heads=layer.tp_q_head_num,
                sm_scale=layer.scaling,
                basis=bases[layer.layer_id - store.start_layer] if bases else None,
            )
        )
    return specs


def _engine(
    store: PagedStore, layers: list[LayerSpec], req_to_token: torch.Tensor, quantized_prefill: bool
) -> AttentionEngine:
    """The engine for the device of the pages; only its kernels are imported."""
    if str(store.device).startswith("cuda"):
        from sgl_kvq.attention.gpu import GpuEngine
        from sgl_kvq.host.flash_attention_3 import make_prefill_attention

        return GpuEngine(store, layers, req_to_token, quantized_prefill, make_prefill_attention)
    from sgl_kvq.attention.cpu import CpuEngine

    return CpuEngine(store, layers, req_to_token, quantized_prefill)


def step_input(forward_batch: Any) -> StepInput:
    """The shape of a forward.

    Args:
        forward_batch: SGLang's `ForwardBatch`.

    Raises:
        KvqError: it is neither decode nor plain extend; names the mode.
    """
    mode = forward_batch.forward_mode
    rows, seq_lens = forward_batch.req_pool_indices, forward_batch.seq_lens
    if mode.is_idle():
        return StepInput(StepMode.IDLE, rows, seq_lens)
    if mode.is_decode():
        return StepInput(StepMode.DECODE, rows, seq_lens)
    if not mode.is_extend() or forward_batch.spec_info is not None:
        raise KvqError(f"attention backend kvq: forward mode {mode.name} is not supported")
    return StepInput(
        StepMode.EXTEND,
        rows,
        seq_lens,
        prefix_lens=list(forward_batch.extend_prefix_lens_cpu),
        extend_lens=list(forward_batch.extend_seq_lens_cpu),
    )


def _split_heads(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    layer: LayerSpec,
    save_kv_cache: bool,
    extra: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """View q, k, v as [tokens, heads, head_dim].

    Raises:
        KvqError: KV of another layer or of no layer, or an argument we do not know: a call whose
            KV we would get wrong.
    """
    unknown = {name for name, value in extra.items() if value is not None}
    if k is None or v is None or not save_kv_cache or unknown:
        raise KvqError(
            f"attention backend kvq: layer {layer.layer_id} shares KV with another layer or "
            f"passes {', '.join(sorted(unknown)) or 'no KV'}, which is not supported; run this "
            f"model without --kv-quant"
        )
    num_kv_heads, head_dim = layer.layout.num_kv_heads, layer.layout.head_dim
    return (
        q.view(-1, layer.num_qo_heads, head_dim),
        k.view(-1, num_kv_heads, head_dim),
        v.view(-1, num_kv_heads, head_dim),
    )
