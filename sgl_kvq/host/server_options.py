"""Which options of SGLang quantized pages work with; all others are refused.

The tables hold what is known to work. So an option that a later SGLang adds, or that nobody thought
of, is refused by name instead of being ignored or served wrongly.
"""

from __future__ import annotations

import math
import os
from itertools import chain
from typing import Any

from sgl_kvq.config import MIN_PAGES
from sgl_kvq.errors import ConfigError
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.host.names import BACKEND, TRANSFER_BACKEND, namespace_of
from sgl_kvq.host.options import OPTIONS, flag_of
from sgl_kvq.host.versions.records import fields_of

ALLOW_UNTRIED_ENV = "KVQ_ALLOW_UNTRIED_OPTIONS"

_DROP = "drop the option"
LIMITED: dict[str, tuple[tuple[Any, ...], str]] = {
    "page_size": ((None, PAGE_SIZE), "drop the option: pages are the quantization block"),
    "attention_backend": ((None, BACKEND), _DROP),
    "prefill_attention_backend": ((None, BACKEND), _DROP),
    "decode_attention_backend": ((None, BACKEND), _DROP),
    "kv_cache_dtype": (("auto",), "drop the option: --kv-quant says how KV is stored"),
    "speculative_algorithm": ((None,), "run without speculative decoding"),
    "cuda_graph_backend_decode": ((None, "full", "disabled"), _DROP),
    "cuda_graph_backend_prefill": ((None, "breakable", "disabled"), _DROP),
    "enable_deterministic_inference": (
        (False,),
        "drop the option: --kv-quant-prefill quantized makes answers independent of chunking and "
        "cache hits",
    ),
    "rl_on_policy_target": ((None,), _DROP),
    "radix_cache_backend": ((None,), "drop the option: only SGLang's own prefix cache is known"),
    "kv_canary": (("none",), "drop the option: it reads K and V from the pool"),
    "enable_streaming_session": ((False,), _DROP),
    "dcp_size": ((1,), "use --tp-size instead"),
    "attn_cp_size": ((1,), "use --tp-size instead"),
    "pp_size": ((1,), "use --tp-size instead"),
    "disaggregation_decode_retraction_backup": ((None, "cpu_tensor", "none"), _DROP),
    "disaggregation_decode_allocation_policy": (("early",), _DROP),
}
"""Options that work with some values only: those values, and what to do otherwise."""

NEUTRAL_NAMESPACES = frozenset(
    (
        "device",
        "exec.comm",
        "exec.mamba",
        "exec.moe",
        "exec.offload",
        "lora",
        "mm",
        "model",
        "observability",
        "serving",
    )
)
"""Namespaces of options that have no bearing on how KV is stored, read, or moved.

What an unsupported model needs (`mm`, `exec.mamba`) is refused with the model.
"""

KNOWN_BY_NAMESPACE: dict[str, tuple[str, ...]] = {
    "disagg": (
        "disaggregation_bootstrap_port",
        "disaggregation_decode_enable_radix_cache",
        "disaggregation_decode_extra_slots",
        "disaggregation_decode_polling_interval",
        "disaggregation_mode",
        "disaggregation_transfer_backend",
        "num_reserved_decode_tokens",
    ),
    "exec.features": (
        "disable_outlines_disk_cache",
        "enable_custom_logit_processor",
        "enable_fp32_lm_head",
        "enable_memory_saver",
        "enable_return_hidden_states",
        "enable_return_routed_experts",
        "enable_tf32_matmul",
        "enable_watermark",
        "enable_weights_cpu_backup",
        "return_hidden_states_mode",
        "sampling_mask_max_tokens",
        "watermark_config",
        "watermark_context_window",
        "watermark_default_enabled",
        "watermark_enforce_all",
        "watermark_key",
        "watermark_key_b",
        "watermark_max_probability",
        "watermark_mixing_probability",
    ),
    "exec.graph": (
        "cuda_graph_bs_decode",
        "cuda_graph_bs_prefill",
        "cuda_graph_max_bs_decode",
        "cuda_graph_max_bs_prefill",
        "debug_cuda_graph",
        "disable_cuda_graph",
        "disable_cuda_graph_padding",
        "disable_decode_cuda_graph",
        "disable_prefill_cuda_graph",
        "enable_cudagraph_gc",
        "enable_profile_cuda_graph",
    ),
    "exec.kernel": (
        "bf16_gemm_backend",
        "disable_flashinfer_autotune",
        "enable_fused_qk_norm_rope",
        "flashinfer_autotune_skip_ops",
        "fp4_gemm_runner_backend",
        "fp8_gemm_runner_backend",
        "grammar_backend",
        "sampling_backend",
    ),
    "memory": (
        "disable_radix_cache",
        "radix_eviction_policy",
    ),
    "parallel": (
        "attn_dp_size",
        "dist_init_addr",
        "dist_timeout",
        "dp_size",
        "enable_dp_attention",
        "enable_dp_lm_head",
        "enable_p2p_check",
        "ep_size",
        "load_balance_method",
        "moe_dense_tp_size",
        "moe_dp_size",
        "nccl_port",
        "nnodes",
        "node_rank",
        "tp_size",
    ),
    "schedule": (
        "abort_on_priority_when_disabled",
        "chunked_prefill_size",
        "default_priority_value",
        "disable_chunked_prefix_cache",
        "disable_overlap_schedule",
        "disable_priority_preemption",
        "enable_mixed_chunk",
        "enable_prefill_delayer",
        "enable_priority_scheduling",
        "max_prefill_tokens",
        "max_queued_requests",
        "max_running_requests",
        "max_total_tokens",
        "mem_fraction_static",
        "min_free_slots_delay",
        "num_continuous_decode_steps",
        "prefill_decode_interval",
        "prefill_decode_interval_min_bs",
        "prefill_delayer_forward_passes_buckets",
        "prefill_delayer_max_delay_ms",
        "prefill_delayer_max_delay_passes",
        "prefill_delayer_queue_min_ratio",
        "prefill_delayer_token_usage_low_watermark",
        "prefill_delayer_wait_seconds_buckets",
        "prefill_max_requests",
        "priority_scheduling_preemption_threshold",
        "retraction_policy",
        "schedule_conservativeness",
        "schedule_low_priority_values_first",
        "schedule_policy",
        "scheduler_recv_interval",
    ),
}
"""Options of other namespaces that work with all their values."""


def check_options(args: Any) -> None:
    """Refuse server options that quantized pages cannot honour, or that nobody has tried.

    Args:
        args: SGLang's `ServerArgs` as the user gave them.

    Raises:
        ConfigError: names the option, what is expected, what came and what to do.
    """
    for name, (supported, advice) in LIMITED.items():
        value = getattr(args, name, supported[0])
        if value not in supported:
            expected = " or ".join(str(option) for option in supported if option is not None)
            raise ConfigError(
                f"--kv-quant with {flag_of(name)}: expected {expected or 'it unset'}, got {value}; "
                f"{advice}"
            )
    untried = next(iter(untried_options(args)), None)
    if untried is not None and os.environ.get(ALLOW_UNTRIED_ENV) != "1":
        raise ConfigError(
            f"--kv-quant with {flag_of(untried)}: this option is not known to work with quantized "
            f"pages; {_DROP}, or set {ALLOW_UNTRIED_ENV}=1 to try it"
        )
    _check_numbers(args)
    backend = args.disaggregation_transfer_backend
    if args.disaggregation_mode not in ("null", None) and backend != TRANSFER_BACKEND:
        raise ConfigError(
            f"--kv-quant with --disaggregation-mode {args.disaggregation_mode}: expected "
            f"--disaggregation-transfer-backend {TRANSFER_BACKEND}, got {backend}; add it"
        )


def untried_options(args: Any) -> list[str]:
    """Options that were set and stand in no table.

    Args:
        args: SGLang's `ServerArgs` as the user gave them.
    """
    namespaces = namespace_of(type(args))
    known = {*LIMITED, *(option.name for option in OPTIONS), *chain(*KNOWN_BY_NAMESPACE.values())}
    return [
        name
        for name, default in fields_of(type(args))
        if namespaces.get(name) not in NEUTRAL_NAMESPACES
        and name not in known
        and not name.startswith("_")
        and getattr(args, name) != default
    ]


def _check_numbers(args: Any) -> None:
    """Refuse sizes that no server can have."""
    for name in ("mem_fraction_static", *(option.name for option in OPTIONS)):
        value = getattr(args, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{flag_of(name)}: expected a finite number, got {value}")
    least = {"max_running_requests": 1, "max_total_tokens": MIN_PAGES * PAGE_SIZE}
    for name, minimum in least.items():
        value = getattr(args, name)
        if value is not None and value < minimum:
            raise ConfigError(
                f"--kv-quant with {flag_of(name)}: expected at least {minimum}, got {value}; "
                f"raise it"
            )
    chunk = args.chunked_prefill_size
    if chunk is not None and chunk > 0 and chunk % PAGE_SIZE:
        raise ConfigError(
            f"--kv-quant with --chunked-prefill-size: expected a multiple of {PAGE_SIZE}, "
            f"got {chunk}; use {max(PAGE_SIZE, chunk // PAGE_SIZE * PAGE_SIZE)}"
        )
