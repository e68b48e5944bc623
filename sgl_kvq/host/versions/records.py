"""The shapes of SGLang's `ServerArgs`.

Up to 0.5.18 a dataclass that resolves itself in `__post_init__`; from 0.5.19 it stays as the user
gave it until `resolve_once`, which keeps what it decides beside the fields; from 0.5.20 it is a
`msgspec.Struct`.
"""

from __future__ import annotations

import dataclasses
import functools
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_type_hints


class Option(NamedTuple):
    """A field of `ServerArgs`: its name, its annotation, and its default."""

    name: str
    hint: Any
    default: Any


def options_of(group: type) -> list[Option]:
    """Read a plain class of annotated attributes as fields.

    Args:
        group: Each attribute has an annotation as SGLang's argument parser reads them, and a
            default.
    """
    hints = get_type_hints(group, include_extras=True)
    return [Option(name, hint, getattr(group, name)) for name, hint in hints.items()]


def extend_server_args(
    server_args: type,
    name: str,
    module: str,
    options: list[Option],
    resolve: Callable[[Callable[[], None], Any], None],
    from_cli_args: Callable[[Callable[[Any], Any], Any], Any],
) -> Any:
    """Make a subclass of `ServerArgs` with more fields.

    Args:
        server_args: SGLang's class.
        name: Name of the subclass, a global of `module`, so that instances can be pickled.
        module: Module that keeps the subclass.
        options: The fields.
        resolve: Called with SGLang's own resolution and the record when the record is to be
            resolved, once a record.
        from_cli_args: Called with SGLang's constructor from parsed arguments, and the arguments.
    """

    def resolve_record(self: Any) -> None:
        original = functools.partial(getattr(server_args, _resolution_of(server_args)), self)
        if getattr(self, "_resolution_finished", False):
            original()
        else:
            resolve(original, self)

    def from_cli(cls: Any, args: Any) -> Any:
        original = functools.partial(server_args.from_cli_args.__func__, cls)  # type: ignore[attr-defined]
        return from_cli_args(original, args)

    namespace = {
        "__doc__": f"{server_args.__name__} with the options of sgl_kvq.",
        "__module__": module,
        _resolution_of(server_args): resolve_record,
        "from_cli_args": classmethod(from_cli),
    }
    fields: Any = [tuple(option) for option in options]
    if dataclasses.is_dataclass(server_args):
        record = dataclasses.make_dataclass(name, fields, bases=(server_args,), namespace=namespace)
        record.__module__ = module  # Python 3.12 names the caller's; other processes look here
        return record
    import msgspec

    return msgspec.defstruct(
        name, fields, bases=(server_args,), module=module, namespace=namespace, dict=True
    )


def _resolution_of(server_args: type) -> str:
    """Name of the method that resolves a record."""
    return "resolve_once" if hasattr(server_args, "resolve_once") else "__post_init__"


def resolve(args: Any) -> None:
    """Resolve a record, as a launcher does; a record that resolves itself already is."""
    if hasattr(args, "resolve_once"):
        args.resolve_once()


def resolved_value(args: Any, name: str) -> Any:
    """Value of a field after resolution."""
    result = _optional("sglang.srt.arg_groups.overrides:resolution_result")
    return getattr(args, name) if result is None else result(args, name)


def model_config_of(args: Any) -> Any:
    """SGLang's `ModelConfig` of a record that is resolved."""
    make = _optional("sglang.srt.arg_groups.model_override_base:model_config_of")
    return args.get_model_config() if make is None else make(args)


def fields_of(server_args: type) -> Iterator[tuple[str, Any]]:
    """Names and defaults of the fields of `ServerArgs`; a required field has a default like none.

    Args:
        server_args: SGLang's class or ours.
    """
    if dataclasses.is_dataclass(server_args):
        fields: Any = dataclasses.fields(server_args)
    else:
        import msgspec

        fields = msgspec.structs.fields(server_args)
    for field in fields:
        is_made = callable(field.default_factory)
        yield field.name, field.default_factory() if is_made else field.default


def _optional(target: str) -> Any:
    """A name of SGLang, None in versions without it."""
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        return None
