"""Entry point `sglang.srt.plugins`: the only code that hooks SGLang.

Every hook passes straight through while `--kv-quant` is off, and imports the rest of this package
only when it is on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from sgl_kvq.errors import HostError
from sgl_kvq.host import names as host
from sgl_kvq.host.names import BACKEND, TRANSFER_BACKEND
from sgl_kvq.host.server_args import KvqServerArgs, quant_config

_registered = False


def register() -> None:
    """Register all hooks. SGLang calls this in every process, before it parses arguments.

    SGLang logs a hook that fails and goes on, so `check_hooks` runs when a pool is built.
    """
    global _registered
    if _registered:
        return
    _registered = True
    hook, kind = host.HookRegistry.register, host.HookType
    hook(host.SERVER_ARGS, KvqServerArgs, kind.REPLACE)
    for target, function in _AROUND.items():
        hook(target, function, kind.AROUND)
    host.add_attention_backend_choices([BACKEND])
    host.register_attention_backend(BACKEND)(_create_backend)
    host.add_disagg_transfer_backend_choices([TRANSFER_BACKEND])
    _add_transfer_backend()
    # `sgl.Engine` keeps the class as an attribute, which the hook registry does not see.
    engine = sys.modules.get("sglang.srt.entrypoints.engine")
    if engine is not None:
        engine.Engine.server_args_class = KvqServerArgs


def check_hooks() -> None:
    """Make sure that every hook is live in this process.

    Raises:
        HostError: names the hook that is not.
    """
    patched = host.HookRegistry._patched
    missing = [target for target in (host.SERVER_ARGS, *_AROUND) if target not in patched]
    if host.ATTENTION_BACKENDS.get(BACKEND) is not _create_backend:
        missing.append(f"attention backend {BACKEND}")
    if missing:
        raise HostError(
            f"--kv-quant: hooks not live in SGLang {host.installed_version()}: "
            f"{', '.join(missing)}; install sglang=={host.TESTED_VERSION}"
        )


def _create_backend(runner: Any) -> Any:
    from sgl_kvq.host.attention import KvqAttnBackend

    return KvqAttnBackend(runner)


def _resolve_pool_size(
    original: Callable[..., Any], configurator: Any, pre_model_load_memory: int
) -> Any:
    config = quant_config(configurator.server_args)
    if config is None:
        return original(configurator, pre_model_load_memory)
    check_hooks()
    from sgl_kvq.host.sizing import resolve_pool_config

    return resolve_pool_config(configurator, config, pre_model_load_memory)


def _build_pool(original: Callable[..., Any], configurator: Any, **kwargs: Any) -> Any:
    config = quant_config(configurator.server_args)
    if config is None:
        return original(configurator, **kwargs)
    from sgl_kvq.host.sizing import build_pool

    num_tokens = kwargs["sizes"].max_total_num_tokens
    requests = kwargs["req_to_token_pool"]
    # A decode instance has further rows for requests whose pages are still on the way.
    open_slots = requests.size + getattr(requests, "pre_alloc_size", 0)
    return build_pool(configurator, config, num_tokens, open_slots)


def _build_allocator(original: Callable[..., Any], configurator: Any, **kwargs: Any) -> Any:
    if quant_config(configurator.server_args) is None:
        return original(configurator, **kwargs)
    from sgl_kvq.host.sizing import build_allocator

    return build_allocator(configurator, kwargs["token_to_kv_pool"])


def _alloc_extend(original: Callable[..., Any], tree_cache: Any, *args: Any, **kwargs: Any) -> Any:
    if "sgl_kvq.host.allocator" in sys.modules:
        from sgl_kvq.host.allocator import make_room_for_first_pages

        prefix_lens_cpu = kwargs["prefix_lens_cpu"] if "prefix_lens_cpu" in kwargs else args[1]
        make_room_for_first_pages(tree_cache, int((prefix_lens_cpu == 0).sum()))
    return original(tree_cache, *args, **kwargs)


def _start_metrics(original: Callable[..., Any], reporter: Any) -> None:
    original(reporter)
    scheduler, collector = reporter.scheduler, reporter.metrics_collector
    if collector is not None and quant_config(scheduler.server_args) is not None:
        from sgl_kvq.host.metrics import PoolMetrics

        collector.kvq_metrics = PoolMetrics(scheduler.token_to_kv_pool_allocator, collector.labels)


def _log_stats(original: Callable[..., Any], collector: Any, stats: Any) -> None:
    original(collector, stats)
    metrics = getattr(collector, "kvq_metrics", None)
    if metrics is not None:
        metrics.log()


def _prealloc(original: Callable[..., Any], queue: Any, req: Any, *args: Any) -> Any:
    if "sgl_kvq.host.allocator" in sys.modules:
        from sgl_kvq.host.allocator import make_room_for_first_pages

        has_prefix = len(args) > 1 and bool(args[1])
        make_room_for_first_pages(queue.tree_cache, 0 if has_prefix else 1)
    return original(queue, req, *args)


def _add_transfer_backend() -> None:
    """Give SGLang's enum of transfer backends a further member."""
    backends = host.TransferBackend
    if TRANSFER_BACKEND in backends._value2member_map_:
        return
    member = object.__new__(backends)
    member._name_, member._value_ = "KVQ_ZMQ", TRANSFER_BACKEND
    backends._value2member_map_[TRANSFER_BACKEND] = member


def _kv_class(original: Callable[..., Any], transfer_backend: Any, class_type: Any) -> Any:
    if transfer_backend.value != TRANSFER_BACKEND:
        return original(transfer_backend, class_type)
    from sgl_kvq.host.disagg import endpoints as conn
    from sgl_kvq.host.disagg import manager

    kinds = host.KVClassType
    return {
        kinds.KVARGS: host.KVArgs,
        kinds.MANAGER: manager.KvqManager,
        kinds.SENDER: conn.KvqSender,
        kinds.RECEIVER: conn.KvqReceiver,
        kinds.BOOTSTRAP_SERVER: conn.KvqBootstrapServer,
    }[class_type]


def _start_manager(original: Callable[..., Any], queue: Any) -> Any:
    manager = original(queue)
    if queue.transfer_backend.value == TRANSFER_BACKEND:
        scheduler = queue.scheduler
        num_kv_heads = scheduler.model_config.get_total_num_kv_heads()
        manager.start(queue.token_to_kv_pool, num_kv_heads, scheduler.forward_stream)
    return manager


def _support_triton(original: Callable[[str], bool], backend: str) -> bool:
    """Our backend runs on CPUs too, where SGLang's own helper kernels need PyTorch instead."""
    if backend == BACKEND:
        import torch

        return torch.accelerator.is_available()
    return original(backend)


_AROUND: dict[str, Callable[..., Any]] = {
    host.RESOLVE_POOL_SIZE: _resolve_pool_size,
    host.BUILD_POOL: _build_pool,
    host.BUILD_ALLOCATOR: _build_allocator,
    host.ALLOC_EXTEND: _alloc_extend,
    host.SUPPORT_TRITON: _support_triton,
    host.GET_KV_CLASS: _kv_class,
    host.PREFILL_MANAGER: _start_manager,
    host.DECODE_MANAGER: _start_manager,
    host.DECODE_PREALLOC: _prealloc,
    host.METRICS_REPORTER: _start_metrics,
    host.LOG_STATS: _log_stats,
}
