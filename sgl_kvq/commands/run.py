"""`python -m sgl_kvq run MODULE`: run a program of SGLang that does not load its plugins itself."""

from __future__ import annotations

import argparse
import runpy
import sys

from sgl_kvq.errors import ConfigError
from sgl_kvq.host import names as host


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("module", help="full name of the module, as for python -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the module")


def run(args: argparse.Namespace) -> int:
    """Run the module in this process, with `--kv-quant` among its options.

    Args:
        args: `module` and its `arguments`.

    Returns:
        The exit status, 0 unless the module ends the process itself.

    Raises:
        ConfigError: there is no such module.
    """
    host.load_plugins()
    sys.argv = [args.module, *args.arguments]
    try:
        runpy.run_module(args.module, run_name="__main__", alter_sys=True)
    except ImportError as error:
        if error.name == args.module or args.module in str(error):
            raise ConfigError(f"run: expected a module, got {args.module} ({error})") from error
        raise
    return 0
