"""Every SGLang name this package relies on, in one place.

Names resolve lazily (`from sgl_kvq.host.names import KVCache` imports only what KVCache needs), so
that importing this module costs nothing while `--kv-quant` is off. All of them exist in every
supported version.
"""

from __future__ import annotations

import pkgutil
from typing import Any

from sgl_kvq.errors import HostError
from sgl_kvq.host.versions.supported import install_advice, installed_version

BACKEND = "kvq"
"""Attention backend we register."""

TRANSFER_BACKEND = "kvq-zmq"
"""PD transfer backend we register."""

NAMES = {
    # plugin system
    "HookRegistry": "sglang.srt.plugins.hook_registry:HookRegistry",
    "HookType": "sglang.srt.plugins.hook_registry:HookType",
    "load_plugins": "sglang.srt.plugins:load_plugins",
    # options
    "Arg": "sglang.srt.arg_groups.arg_utils:Arg",
    "NS": "sglang.srt.arg_groups.arg_utils:NS",
    "namespace_of": "sglang.srt.arg_groups.arg_utils:namespace_of",
    "ServerArgs": "sglang.srt.server_args:ServerArgs",
    "add_attention_backend_choices": "sglang.srt.server_args:add_attention_backend_choices",
    "get_schedule": "sglang.srt.runtime_context:get_schedule",
    "get_parallel": "sglang.srt.runtime_context:get_parallel",
    "get_exec": "sglang.srt.runtime_context:get_exec",
    "get_disagg": "sglang.srt.runtime_context:get_disagg",
    # PD disaggregation
    "add_disagg_transfer_backend_choices": (
        "sglang.srt.server_args:add_disagg_transfer_backend_choices"
    ),
    "TransferBackend": "sglang.srt.disaggregation.utils:TransferBackend",
    "KVClassType": "sglang.srt.disaggregation.utils:KVClassType",
    "KVArgs": "sglang.srt.disaggregation.base.conn:KVArgs",
    "KVPoll": "sglang.srt.disaggregation.base.conn:KVPoll",
    "KVTransferError": "sglang.srt.disaggregation.common.conn:KVTransferError",
    "CommonKVManager": "sglang.srt.disaggregation.common.conn:CommonKVManager",
    "CommonKVSender": "sglang.srt.disaggregation.common.conn:CommonKVSender",
    "CommonKVReceiver": "sglang.srt.disaggregation.common.conn:CommonKVReceiver",
    "CommonKVBootstrapServer": "sglang.srt.disaggregation.common.conn:CommonKVBootstrapServer",
    # model
    "AttentionArch": "sglang.srt.configs.model_config:AttentionArch",
    "mambaish_config": "sglang.srt.configs.hybrid_arch:mambaish_config",
    "RadixAttention": "sglang.srt.layers.radix_attention:RadixAttention",
    "AttentionType": "sglang.srt.layers.radix_attention:AttentionType",
    "LogitsProcessor": "sglang.srt.layers.logits_processor:LogitsProcessor",
    "LogitsMetadata": "sglang.srt.layers.logits_processor:LogitsMetadata",
    "ForwardBatch": "sglang.srt.model_executor.forward_batch_info:ForwardBatch",
    "ForwardMode": "sglang.srt.model_executor.forward_batch_info:ForwardMode",
    "CaptureHiddenMode": "sglang.srt.model_executor.forward_batch_info:CaptureHiddenMode",
    # attention
    "AttentionBackend": "sglang.srt.layers.attention.base_attn_backend:AttentionBackend",
    "ATTENTION_BACKENDS": "sglang.srt.layers.attention.attention_registry:ATTENTION_BACKENDS",
    "register_attention_backend": (
        "sglang.srt.layers.attention.attention_registry:register_attention_backend"
    ),
    # memory
    "KVCache": "sglang.srt.mem_cache.memory_pool:KVCache",
    "GPU_MEMORY_TYPE_KV_CACHE": "sglang.srt.constants:GPU_MEMORY_TYPE_KV_CACHE",
    "KVCacheConfigurator": "sglang.srt.mem_cache.kv_cache_configurator:KVCacheConfigurator",
    "MemoryPoolConfig": "sglang.srt.model_executor.pool_configurator:MemoryPoolConfig",
    "PagedTokenToKVPoolAllocator": (
        "sglang.srt.mem_cache.allocator.paged:PagedTokenToKVPoolAllocator"
    ),
    "alloc_extend_naive": "sglang.srt.mem_cache.allocator.paged:alloc_extend_naive",
    "get_num_new_pages": "sglang.srt.utils:get_num_new_pages",
    "EvictParams": "sglang.srt.mem_cache.base_prefix_cache:EvictParams",
    # platform
    "CpuDeviceMixin": "sglang.srt.platforms.cpu:CpuDeviceMixin",
    "PlatformEnum": "sglang.srt.platforms.device_mixin:PlatformEnum",
    "SRTPlatform": "sglang.srt.platforms.interface:SRTPlatform",
    "MHATokenToKVPool": "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool",
}

SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
RESOLVE_POOL_SIZE = f"{_CONFIGURATOR}._resolve_memory_pool_config"
BUILD_POOL = f"{_CONFIGURATOR}._build_token_to_kv_pool"
BUILD_ALLOCATOR = f"{_CONFIGURATOR}._build_token_to_kv_pool_allocator"
INIT_CUDA_GRAPHS = "sglang.srt.managers.scheduler.Scheduler.init_all_cuda_graphs"
ALLOC_EXTEND = "sglang.srt.mem_cache.allocation.alloc_paged_token_slots_extend"
GET_KV_CLASS = "sglang.srt.disaggregation.utils.get_kv_class"
PREFILL_MANAGER = "sglang.srt.disaggregation.prefill.PrefillBootstrapQueue._init_kv_manager"
_PREALLOC_QUEUE = "sglang.srt.disaggregation.decode.DecodePreallocQueue"
DECODE_MANAGER = f"{_PREALLOC_QUEUE}._init_kv_manager"
CREATE_SENDER = "sglang.srt.disaggregation.prefill.PrefillBootstrapQueue.create_sender"
CREATE_RECEIVER = f"{_PREALLOC_QUEUE}._create_receiver_and_enqueue"
DECODE_PREALLOC = f"{_PREALLOC_QUEUE}._pre_alloc"
UPDATE_WEIGHTS = tuple(
    "sglang.srt.managers.scheduler_components.weight_updater"
    f".SchedulerWeightUpdaterManager.update_weights_from_{source}"
    for source in ("disk", "distributed", "tensor", "ipc")
)
SUPPORT_TRITON = "sglang.srt.utils.common.support_triton"
METRICS_REPORTER = (
    "sglang.srt.managers.scheduler_components.metrics_reporter"
    ".SchedulerMetricsReporter.__post_init__"
)
LOG_STATS = "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector.log_stats"


def __getattr__(name: str) -> Any:
    target = NAMES.get(name)
    if target is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        raise HostError(
            f"SGLang {installed_version()} has no {target}; {install_advice()}"
        ) from error
