"""Which commit a result was made with."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git_commit() -> str:
    """Return the short hash of the checked-out commit, or "unknown" outside a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return result.stdout.strip() if result.returncode == 0 else "unknown"
