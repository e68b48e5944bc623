"""Helpers of the tests."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
"""Folder of the repository."""
