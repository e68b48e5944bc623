"""Private attributes of SGLang that have no public accessor, each read in one place."""

from __future__ import annotations

import sys
from typing import Any


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
