"""Private attributes of SGLang that have no public accessor, each read in one place."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch


def patched_targets(hook_registry: Any) -> set[str]:
    """Targets of SGLang's `HookRegistry` whose hooks are live in this process."""
    return hook_registry._patched


def add_enum_member(enum: Any, name: str, value: str) -> None:
    """Add a member to an enum of SGLang, so that `enum(value)` finds it."""
    if value in enum._value2member_map_:
        return
    member = object.__new__(enum)
    member._name_, member._value_ = name, value
    enum._value2member_map_[value] = member


def replace_engine_args(server_args: Any) -> None:
    """Let `sgl.Engine` build its options with this class, which the hook registry cannot reach.

    `Engine` keeps the class as an attribute. An engine that is imported later finds the class in
    SGLang's module, where the hook has replaced it by then.
    """
    engine = sys.modules.get("sglang.srt.entrypoints.engine")
    if engine is not None:
        engine.Engine.server_args_class = server_args


def attn_dp_size(configurator: Any) -> int:
    """Data-parallel groups of attention, from SGLang's `KVCacheConfigurator`."""
    return getattr(configurator, "ps", configurator).attn_dp_size


def captures_prefill_graph() -> bool:
    """Whether SGLang records its breakable prefill graph, attention between two of its pieces."""
    return bool(_breakable_cuda_graph()._current_capture_var.get() is not None)


def _breakable_cuda_graph() -> Any:
    return import_module(
        "sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph.breakable_cuda_graph"
    )


def prefill_graph_output(forward_batch: Any) -> torch.Tensor | None:
    """Where a piece of SGLang's breakable prefill graph reads the output of attention.

    Returns:
        [tokens, num_qo_heads * head_dim], padding left out; None outside of such a graph.
    """
    return forward_batch._attn_output


@contextmanager
def without_prefill_graph(runner: Any) -> Iterator[None]:
    """Let SGLang's `ModelRunner` run prefill steps eagerly: in a graph no hook of a module runs."""
    graph_runner = runner.prefill_cuda_graph_runner
    runner.prefill_cuda_graph_runner = None
    try:
        yield
    finally:
        runner.prefill_cuda_graph_runner = graph_runner
