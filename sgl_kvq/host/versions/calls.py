"""Arguments that we pass to SGLang and that SGLang passes to us, compared with what is installed.

A private function of SGLang changes without notice. `differences` finds at start what would
otherwise fail, or do something else, in the middle of a request.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from inspect import Parameter
from typing import Any

_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator:KVCacheConfigurator"
_PAGED = "sglang.srt.mem_cache.allocator.paged"
_WEIGHTS = "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager"
_CONN = "sglang.srt.disaggregation.common.conn"

CALLED: dict[str, tuple[str, ...]] = {
    f"{_CONFIGURATOR}._profile_available_bytes": ("self", "pre_model_load_memory"),
    f"{_CONFIGURATOR}._apply_token_constraints": ("self", "token_capacity"),
    "sglang.srt.model_executor.pool_configurator:MemoryPoolConfig": (
        "max_total_num_tokens",
        "max_running_requests",
        "mem_fraction_static",
    ),
    "sglang.srt.mem_cache.memory_pool:KVCache": (
        "size",
        "page_size",
        "dtype",
        "layer_num",
        "device",
        "enable_memory_saver",
        "start_layer",
        "end_layer",
    ),
    f"{_PAGED}:PagedTokenToKVPoolAllocator": (
        "size",
        "page_size",
        "dtype",
        "device",
        "kvcache",
        "need_sort",
    ),
    f"{_PAGED}:PagedTokenToKVPoolAllocator.alloc_extend": (
        "self",
        "prefix_lens",
        "prefix_lens_cpu",
        "seq_lens",
        "seq_lens_cpu",
        "last_loc",
        "extend_num_tokens",
        "num_new_pages",
    ),
    f"{_PAGED}:PagedTokenToKVPoolAllocator.alloc_decode": (
        "self",
        "seq_lens",
        "seq_lens_cpu",
        "last_loc",
    ),
    f"{_PAGED}:PagedTokenToKVPoolAllocator._release_page_ids": ("self", "page_ids"),
    f"{_PAGED}:alloc_extend_naive": (
        "prefix_lens",
        "seq_lens",
        "last_loc",
        "free_pages",
        "out_indices",
        "page_size",
        "device",
    ),
    "sglang.srt.utils:get_num_new_pages": ("seq_lens", "page_size", "prefix_lens"),
    "sglang.srt.mem_cache.base_prefix_cache:EvictParams": ("num_tokens",),
    f"{_CONN}:CommonKVManager": ("args", "disaggregation_mode", "server_args", "is_mla_backend"),
    f"{_CONN}:CommonKVManager.update_status": ("self", "bootstrap_room", "status"),
    f"{_CONN}:CommonKVManager.record_failure": ("self", "bootstrap_room", "failure_reason"),
    f"{_CONN}:CommonKVManager.try_ensure_parallel_info": ("self", "bootstrap_addr"),
    f"{_CONN}:CommonKVSender.init": ("self", "num_kv_indices", "aux_index"),
    f"{_CONN}:CommonKVSender._prepare_send_indices": ("self", "kv_indices", "state_indices"),
    f"{_CONN}:CommonKVSender._record_transfer_indices": ("self", "kv_indices", "state_indices"),
    f"{_CONN}:CommonKVReceiver": ("mgr", "bootstrap_addr", "bootstrap_room"),
    f"{_CONN}:CommonKVReceiver.init": ("self", "prefill_dp_rank"),
    "sglang.srt.disaggregation.utils:get_kv_class": ("transfer_backend", "class_type"),
    f"{_WEIGHTS}.update_weights_from_disk": ("self", "recv_req"),
    f"{_WEIGHTS}.update_weights_from_distributed": ("self", "recv_req"),
    f"{_WEIGHTS}.update_weights_from_tensor": ("self", "recv_req"),
    f"{_WEIGHTS}.update_weights_from_ipc": ("self", "recv_req"),
    "sglang.srt.managers.scheduler:Scheduler.init_all_cuda_graphs": ("self",),
    "sglang.srt.model_executor.forward_batch_info:ForwardBatch": (
        "forward_mode",
        "batch_size",
        "input_ids",
        "req_pool_indices",
        "seq_lens",
        "out_cache_loc",
        "seq_lens_sum",
        "orig_seq_lens",
        "spec_algorithm",
        "seq_lens_cpu",
        "capture_hidden_mode",
        "positions",
        "extend_num_tokens",
        "extend_seq_lens",
        "extend_prefix_lens",
        "extend_start_loc",
        "extend_prefix_lens_cpu",
        "extend_seq_lens_cpu",
    ),
    "sglang.srt.layers.logits_processor:LogitsMetadata": ("forward_mode",),
    "sglang.srt.layers.logits_processor:LogitsProcessor.forward": (
        "self",
        "input_ids",
        "hidden_states",
        "lm_head",
        "logits_metadata",
    ),
}
"""Function or class of SGLang that we call or wrap, and the arguments we name or pass in order."""

OVERRIDING = {
    "sgl_kvq.host.allocator:KvqPagedAllocator": False,
    "sgl_kvq.host.attention:KvqAttnBackend": False,
    "sgl_kvq.host.cpu_platform.allocator:CpuPagedAllocator": True,
    "sgl_kvq.host.disagg.endpoints:KvqReceiver": True,
    "sgl_kvq.host.disagg.endpoints:KvqSender": True,
    "sgl_kvq.host.disagg.manager:KvqManager": True,
    "sgl_kvq.host.pool:QuantizedKVPool": False,
}
"""Our subclasses of SGLang's classes; whether SGLang makes their instances."""


def differences() -> list[str]:
    """What does not fit the installed SGLang, one phrase each; none if all is well."""
    found = [text for target, names in CALLED.items() for text in _call_differences(target, names)]
    for path, is_made_by_sglang in OVERRIDING.items():
        found += _override_differences(pkgutil.resolve_name(path), is_made_by_sglang)
    return found


def argument(function: Callable[..., Any], name: str, /, *args: Any, **kwargs: Any) -> Any:
    """Value of an argument of a call, wherever it stands.

    Args:
        function: The function called.
        name: Name of one of its parameters.
        args: Positional arguments of the call.
        kwargs: Its keyword arguments.
    """
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments[name]


def _call_differences(target: str, names: tuple[str, ...]) -> list[str]:
    try:
        parameters = inspect.signature(pkgutil.resolve_name(target)).parameters
    except (ImportError, AttributeError):
        return [f"{target} is gone"]
    missing = [name for name in names if name not in parameters]
    required = [
        name
        for name, parameter in parameters.items()
        if name not in names and _is_required(parameter)
    ]
    found = []
    if missing:
        found.append(f"{target} has no argument {', '.join(missing)}")
    if required:
        found.append(f"{target} needs {', '.join(required)}")
    order = [name for name in parameters if name in names]
    if not missing and order != list(names):
        found.append(f"{target} takes {', '.join(order)} in this order")
    return found


def _override_differences(ours: type, with_constructor: bool) -> list[str]:
    """Methods of a class that would not take what SGLang passes to those they override."""
    found = []
    for name, method in vars(ours).items():
        base = next((c for c in ours.__mro__[1:] if name in vars(c)), None)
        overridden = None if base is None else vars(base)[name]
        if base is None or not base.__module__.startswith("sglang."):
            continue
        if not inspect.isfunction(method) or not inspect.isfunction(overridden):
            continue
        if name == "__init__" and not with_constructor:
            continue
        own = inspect.signature(method).parameters
        theirs = inspect.signature(overridden).parameters
        takes_all = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in own.values())
        unknown = [parameter for parameter in theirs if parameter not in own and not takes_all]
        absent = [
            name
            for name, parameter in own.items()
            if name not in theirs and _is_required(parameter)
        ]
        if unknown:
            found.append(f"{ours.__name__}.{name} does not take {', '.join(unknown)}")
        if absent:
            found.append(f"{ours.__name__}.{name} needs {', '.join(absent)}, which SGLang lacks")
    return found


def _is_required(parameter: Parameter) -> bool:
    variadic = parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return parameter.default is Parameter.empty and not variadic
