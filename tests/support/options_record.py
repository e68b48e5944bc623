"""A record of options like that of `sgl_kvq.host.server_args`, over a stand-in for SGLang's class.

It needs no package, so that any Python can load it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sgl_kvq.host.versions.records import Option, extend_server_args


@dataclass
class StandIn:
    """What SGLang's `ServerArgs` is up to 0.5.19: a dataclass that resolves itself."""

    model_path: str
    page_size: int = 1

    def __post_init__(self) -> None:
        """Resolve the record."""

    @classmethod
    def from_cli_args(cls, args: Any) -> StandIn:
        """Make a record of parsed arguments."""
        return cls(args.model_path)


def _resolve(original: Callable[[], None], args: Any) -> None:
    original()
    args.page_size = 64


OptionsRecord: Any = extend_server_args(
    StandIn,
    "OptionsRecord",
    __name__,
    [Option("kv_quant", str | None, None)],
    _resolve,
    lambda original, args: original(args),
)
