"""SGLang's `ServerArgs` with the `--kv-quant` options.

With the option off this imports nothing of what the options are about.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from sgl_kvq.errors import ConfigError, KvqError
from sgl_kvq.host.names import TRANSFER_BACKEND, ServerArgs
from sgl_kvq.host.options import OPTIONS, PREFIX, flag_of
from sgl_kvq.host.versions.records import extend_server_args

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
