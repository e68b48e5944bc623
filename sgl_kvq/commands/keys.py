"""`python -m sgl_kvq keys FOLDER`: CURVE keys for PD transfer beyond one machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("folder", type=Path, help="where the key files go")
    parser.add_argument(
        "--decode",
        nargs="+",
        default=["decode"],
        metavar="NAME",
        help="one key for each decode instance (default: decode)",
    )


def run(args: argparse.Namespace) -> int:
    """Make the keys and say which file belongs where."""
    from sgl_kvq.transfer.runtime.curve import make_keys

    make_keys(args.folder, args.decode)
    publics = " ".join(f"{name}.key" for name in args.decode)
    lines = [f"prefill instances: prefill.key_secret {publics}"]
    lines += [f"decode instance {name}: {name}.key_secret prefill.key" for name in args.decode]
    sys.stdout.write(
        f"{args.folder}: keys made; give each instance a folder with these files only\n"
        + "".join(f"  {line}\n" for line in lines)
    )
    return 0
