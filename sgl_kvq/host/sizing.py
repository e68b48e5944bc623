"""Replace the host's pool sizing and construction when `--kv-quant` is on."""

from __future__ import annotations

import logging
from typing import Any

from sgl_kvq.config import KVQuantConfig
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.host.allocator import KvqCpuPagedAllocator, KvqPagedAllocator
from sgl_kvq.host.names import MemoryPoolConfig, get_disagg, get_exec, get_parallel, get_schedule
from sgl_kvq.host.pool import QuantizedKVPool
from sgl_kvq.host.resolution import page_layouts
from sgl_kvq.host.versions.internals import attn_dp_size
from sgl_kvq.memory_pool.capacity import PoolPlan, plan_pool

logger = logging.getLogger(__name__)


def resolve_pool_config(
    configurator: Any, config: KVQuantConfig, pre_model_load_memory: int
) -> Any:
    """Size the pool from real bytes; see `KVCacheConfigurator._resolve_memory_pool_config`.

    Args:
        configurator: SGLang's `KVCacheConfigurator`.
        config: The options.
        pre_model_load_memory: Free GiB before the weights were loaded.

    Returns:
        SGLang's `MemoryPoolConfig`.

    Raises:
        ConfigError: too little memory.
    """
    if config.memory_gb is None:
        budget = configurator._profile_available_bytes(pre_model_load_memory)
    else:
        budget = int(config.memory_gb * 2**30)
    # Requests whose pages are still on the way to a decode instance hold open pages, too.
    arriving = 0
    if get_disagg().disaggregation_mode == "decode":
        arriving = get_disagg().disaggregation_decode_extra_slots or 0
    running = get_schedule().max_running_requests
    if running is not None:
        running = max(1, running // attn_dp_size(configurator))
    widest = _plan(configurator, config, budget, None if running is None else running + arriving)
    max_tokens = configurator._apply_token_constraints(widest.num_tokens)
    if running is None:
        running = _plan(configurator, config, budget, None, max_tokens).open_slots
    plan = _plan(configurator, config, budget, running + arriving, max_tokens)
    return MemoryPoolConfig(
        max_total_num_tokens=plan.num_tokens,
        max_running_requests=running,
        mem_fraction_static=get_schedule().mem_fraction_static,
    )


def _plan(
    configurator: Any,
    config: KVQuantConfig,
    budget: int,
    open_slots: int | None,
    max_tokens: int | None = None,
) -> PoolPlan:
    return plan_pool(
        budget,
        _rank_layouts(configurator, config),
        config.sink_tokens,
        open_slots,
        max_tokens,
    )


def _rank_layouts(configurator: Any, config: KVQuantConfig) -> tuple[PageLayout, ...]:
    """Layouts of the layers of this rank."""
    layouts = page_layouts(
        config, configurator.model_config, get_parallel().attn_tp_size, configurator.model_dtype
    )
    first = configurator.layer_info.start_layer
    return layouts[first : first + configurator.layer_info.num_effective_layers]


def build_pool(
    configurator: Any, config: KVQuantConfig, num_tokens: int, open_slots: int
) -> QuantizedKVPool:
    """Build the pool; see `KVCacheConfigurator._build_token_to_kv_pool`.

    Args:
        configurator: SGLang's `KVCacheConfigurator`.
        config: The options.
        num_tokens: Capacity, a multiple of the page size.
        open_slots: Rows of the request pool: each holds at most one open page.
    """
    return QuantizedKVPool(
        PoolPlan(
            layouts=_rank_layouts(configurator, config),
            sink_tokens=config.sink_tokens,
            num_pages=num_tokens // configurator.page_size,
            open_slots=open_slots,
        ),
        device=configurator.device,
        start_layer=configurator.layer_info.start_layer,
        enable_memory_saver=get_exec().features.enable_memory_saver,
    )


def build_allocator(configurator: Any, pool: QuantizedKVPool) -> Any:
    """Build the allocator; see `KVCacheConfigurator._build_token_to_kv_pool_allocator`."""
    allocator_cls = KvqCpuPagedAllocator if configurator.device == "cpu" else KvqPagedAllocator
    return allocator_cls(
        pool.size,
        page_size=pool.page_size,
        dtype=pool.dtype,
        device=configurator.device,
        kvcache=pool,
        need_sort=get_disagg().disaggregation_mode in ("decode", "prefill"),
    )
