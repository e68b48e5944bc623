"""`python -m sgl_kvq COMMAND`: commands beside the server."""

from __future__ import annotations

import argparse
import importlib
import sys

from sgl_kvq.errors import KvqError

# Name: (module, help). A module is imported only when its command runs.
COMMANDS: dict[str, tuple[str, str]] = {
    "advise": (
        "sgl_kvq.commands.advise",
        "Measure what each format loses on a model, and recommend one.",
    ),
    "calibrate": (
        "sgl_kvq.commands.calibrate.command",
        "Measure a model's Q, K and V for calibrated formats (--kv-quant-config).",
    ),
    "check": (
        "sgl_kvq.commands.check.command",
        "Say whether GPU, SGLang, hooks and kernels work here.",
    ),
    "formats": ("sgl_kvq.commands.formats", "List the formats of --kv-quant."),
    "keys": ("sgl_kvq.commands.keys", "Make CURVE keys for PD transfer beyond one machine."),
    "run": (
        "sgl_kvq.commands.run",
        "Run a module of SGLang, such as benchmark.one_batch, with --kv-quant.",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; errors end it with one line.

    Args:
        argv: Arguments after the program's name; None takes those of the process.

    Returns:
        The exit status.
    """
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m sgl_kvq")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, (module_name, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name == chosen:
            module = importlib.import_module(module_name)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    try:
        return int(args.run(args))
    except KvqError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
