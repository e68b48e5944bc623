"""SGLang's `ServerArgs` with the `--kv-quant` options.

With the option off this imports nothing of what the options are about.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sgl_kvq.errors import ConfigError, KvqError
from sgl_kvq.host.names import TRANSFER_BACKEND, ServerArgs
from sgl_kvq.host.options import OPTIONS, PREFIX, flag_of
from sgl_kvq.host.versions.records import extend_server_args

if TYPE_CHECKING:
    from sgl_kvq.config import KVQuantConfig

_FROM_COMMAND_LINE = "_kvq_from_command_line"
"""Attribute of records made from a command line: their errors end the process with one line."""


def _from_cli_args(original: Callable[[Any], Any], parsed: Any) -> Any:
    try:
        args = original(parsed)
    except KvqError as error:
        sys.exit(f"error: {error}")
    setattr(args, _FROM_COMMAND_LINE, True)
    return args


def _resolve(original: Callable[[], None], args: Any) -> None:
    """Check the options, let SGLang resolve the record, and check what depends on the model.

    Args:
        original: SGLang's own resolution.
        args: The record, as the user gave it.

    Raises:
        ConfigError: something does not fit, and the record is not from a command line.
    """
    try:
        if args.kv_quant is None:
            _refuse_stray_options(args)
            original()
            return
        from sgl_kvq.host import resolution

        resolution.prepare(args)
        resolution.run(original, args)
        resolution.validate(args)
    except KvqError as error:
        if getattr(args, _FROM_COMMAND_LINE, False):
            sys.exit(f"error: {error}")
        raise


KvqServerArgs: Any = extend_server_args(
    ServerArgs, "KvqServerArgs", __name__, OPTIONS, _resolve, _from_cli_args
)
"""Replaces `sglang.srt.server_args.ServerArgs` in the whole process."""


def _refuse_stray_options(args: Any) -> None:
    """Refuse our other options without `--kv-quant`.

    Raises:
        ConfigError: names the option.
    """
    if args.disaggregation_transfer_backend == TRANSFER_BACKEND:
        raise ConfigError(
            f"--disaggregation-transfer-backend {TRANSFER_BACKEND}: expected --kv-quant FORMAT "
            f"beside it (bf16 for unquantized pages); add it"
        )
    for option in OPTIONS:
        if option.name.startswith(PREFIX) and getattr(args, option.name) != option.default:
            flag = flag_of(option.name)
            raise ConfigError(
                f"{flag}: expected --kv-quant FORMAT beside it; add it or drop {flag}"
            )


def quant_config(args: Any) -> KVQuantConfig | None:
    """Read the options of the KV cache.

    Args:
        args: `ServerArgs`, ours or SGLang's own.

    Returns:
        None when `--kv-quant` is off.

    Raises:
        ConfigError: a value is out of range.
    """
    name = getattr(args, "kv_quant", None)
    if name is None:
        return None
    from sgl_kvq.config import KVQuantConfig

    return KVQuantConfig(
        format=name,
        prefill=args.kv_quant_prefill,
        sink_tokens=args.kv_quant_sink_tokens,
        hadamard_block=args.kv_quant_hadamard_block,
        memory_gb=args.kv_quant_memory_gb,
        config_file=args.kv_quant_config,
    )
