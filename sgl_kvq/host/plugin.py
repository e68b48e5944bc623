"""Entry point `sglang.srt.plugins`: the only code that hooks SGLang.

Every hook passes straight through while `--kv-quant` is off, and imports the rest of this package
only when it is on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from sgl_kvq.errors import HostError, KvqError
from sgl_kvq.host import names as host
from sgl_kvq.host.names import BACKEND, TRANSFER_BACKEND
from sgl_kvq.host.options import quant_config
from sgl_kvq.host.server_args import KvqServerArgs
from sgl_kvq.host.versions import calls, internals
from sgl_kvq.host.versions.supported import install_advice, installed_version

_registered = False


class Hook(NamedTuple):
    """A function of SGLang that one of ours is called around.

    Args:
        target: Its qualified name.
        function: Called with SGLang's function and its arguments.
        purpose: What for, as `patches/README.md` lists it.
    """

    target: str
    function: Callable[..., Any]
    purpose: str


def register() -> None:
    """Register all hooks. SGLang calls this in every process, before it parses arguments.

    SGLang logs a hook that fails and goes on, so `check_hooks` runs when a pool is built.
    """
    global _registered
    if _registered:
        return
    _registered = True
    add_hook, kind = host.HookRegistry.register, host.HookType
    add_hook(host.SERVER_ARGS, KvqServerArgs, kind.REPLACE)
    for hook in HOOKS:
        add_hook(hook.target, hook.function, kind.AROUND)
    host.add_attention_backend_choices([BACKEND])
    host.register_attention_backend(BACKEND)(_create_backend)
    host.add_disagg_transfer_backend_choices([TRANSFER_BACKEND])
    internals.add_enum_member(host.TransferBackend, "KVQ_ZMQ", TRANSFER_BACKEND)
    internals.replace_engine_args(KvqServerArgs)


def check_hooks() -> None:
    """Make sure that every hook is live in this process and that SGLang's calls fit ours.

    Raises:
        HostError: names the hook that is not, or the function whose arguments differ.
    """
    patched = internals.patched_targets(host.HookRegistry)
    targets = [host.SERVER_ARGS, *(hook.target for hook in HOOKS)]
    missing = [target for target in targets if target not in patched]
    if host.ATTENTION_BACKENDS.get(BACKEND) is not _create_backend:
        missing.append(f"attention backend {BACKEND}")
    wrong = [f"hooks not live: {', '.join(missing)}"] if missing else []
    wrong += calls.differences()
    if wrong:
        raise HostError(
            f"--kv-quant with SGLang {installed_version()}: {'; '.join(wrong)}; {install_advice()}"
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


def _init_cuda_graphs(original: Callable[..., Any], scheduler: Any) -> None:
    original(scheduler)
    if quant_config(scheduler.server_args) is not None:
        from sgl_kvq.host.start_check import check_loss

        try:
            check_loss(scheduler)
        except KvqError as error:
            _end_rank(f"error: {error}")


def _end_rank(line: str) -> NoReturn:
    """End the process of a rank with one line, and the server that started it as SGLang does."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
    if multiprocessing.parent_process() is not None:
        os.kill(os.getppid(), signal.SIGQUIT)
    sys.exit(1)


def _alloc_extend(original: Callable[..., Any], tree_cache: Any, *args: Any, **kwargs: Any) -> Any:
    _let_evict(tree_cache)
    return original(tree_cache, *args, **kwargs)


def _let_evict(tree_cache: Any) -> None:
    """Give a quantized pool's allocator the prefix cache that it may evict from."""
    allocator = tree_cache.token_to_kv_pool_allocator
    if hasattr(allocator, "evictable_cache"):
        allocator.evictable_cache = tree_cache


def _start_metrics(original: Callable[..., Any], reporter: Any) -> None:
    original(reporter)
    scheduler, collector = reporter.scheduler, reporter.metrics_collector
    if collector is not None and quant_config(scheduler.server_args) is not None:
        from sgl_kvq.host.metrics import PoolMetrics

        allocator = scheduler.token_to_kv_pool_allocator
        collector.kvq_metrics = PoolMetrics(allocator, collector.labels)
        allocator.on_clear = collector.kvq_metrics.log


def _log_stats(original: Callable[..., Any], collector: Any, stats: Any) -> None:
    original(collector, stats)
    metrics = getattr(collector, "kvq_metrics", None)
    if metrics is not None:
        metrics.log()


def _prealloc(original: Callable[..., Any], queue: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    _let_evict(queue.tree_cache)
    return original(queue, req, *args, **kwargs)


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
        scheduler.kvq_manager = manager
        manager.start(queue.token_to_kv_pool, scheduler.model_config, scheduler.forward_stream)
    return manager


def _update_weights(original: Callable[..., Any], updater: Any, request: Any) -> Any:
    manager = getattr(updater.scheduler, "kvq_manager", None)
    if manager is not None:
        manager.weights.begin_update()
    result = original(updater, request)
    if manager is not None and result.success and request.weight_version is not None:
        manager.weights.name(request.weight_version)
    return result


def _create_sender(
    original: Callable[..., Any], queue: Any, req: Any, *args: Any, **kwargs: Any
) -> Any:
    created = original(queue, req, *args, **kwargs)
    if created and hasattr(req.disagg_kv_sender, "set_prompt"):
        req.disagg_kv_sender.set_prompt(req.origin_input_ids)
    return created


def _create_receiver(
    original: Callable[..., Any], queue: Any, req: Any, *args: Any, **kwargs: Any
) -> Any:
    created = original(queue, req, *args, **kwargs)
    if hasattr(created.kv_receiver, "set_prompt"):
        again = calls.argument(original, "is_rebootstrap", queue, req, *args, **kwargs)
        answered = list(req.output_ids) if again else []
        created.kv_receiver.set_prompt([*req.origin_input_ids, *answered])
    return created


def _support_triton(original: Callable[[str], bool], backend: str) -> bool:
    """Our backend runs on CPUs too, where SGLang's own helper kernels need PyTorch instead."""
    if backend == BACKEND:
        import torch

        return torch.accelerator.is_available()
    return original(backend)


HOOKS = (
    Hook(host.RESOLVE_POOL_SIZE, _resolve_pool_size, "capacity from real bytes"),
    Hook(host.BUILD_POOL, _build_pool, "the quantized pool"),
    Hook(host.BUILD_ALLOCATOR, _build_allocator, "the allocator, of open slots and sink rows too"),
    Hook(host.INIT_CUDA_GRAPHS, _init_cuda_graphs, "what the format loses, before it serves"),
    Hook(host.ALLOC_EXTEND, _alloc_extend, "the prefix cache that our allocator may evict from"),
    Hook(host.DECODE_PREALLOC, _prealloc, "the same on a PD decode instance"),
    Hook(host.SUPPORT_TRITON, _support_triton, "PyTorch helpers instead of Triton ones on a CPU"),
    Hook(host.GET_KV_CLASS, _kv_class, "our classes for PD transfer"),
    Hook(host.PREFILL_MANAGER, _start_manager, "the transfer thread of a PD prefill instance"),
    Hook(host.DECODE_MANAGER, _start_manager, "the transfer thread of a PD decode instance"),
    Hook(host.CREATE_SENDER, _create_sender, "the prompt of a PD transfer, at the sender"),
    Hook(host.CREATE_RECEIVER, _create_receiver, "the same at the receiver, to be compared"),
    *(
        Hook(target, _update_weights, "which weights a PD instance serves")
        for target in host.UPDATE_WEIGHTS
    ),
    Hook(host.METRICS_REPORTER, _start_metrics, "our gauges, beside SGLang's"),
    Hook(host.LOG_STATS, _log_stats, "their values, whenever SGLang sets its own"),
)
"""All functions of SGLang that we wrap."""
