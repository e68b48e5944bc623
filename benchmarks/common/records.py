"""Results files, and which commit and command made them."""

from __future__ import annotations

import csv
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def git_commit() -> str:
    """Return the short hash of the checked-out commit, or "unknown" outside a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def command_line(module: str, argv: Sequence[str]) -> str:
    """Return the command that ran a benchmark."""
    return shlex.join(["python", "-m", f"benchmarks.{module}", *argv])


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of equal columns with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def append_csv(path: Path, row: dict[str, Any]) -> None:
    """Write one row at once, behind those that are there; columns must be the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a results file; none if there is no file yet."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
