"""Where commands print their tables."""

from __future__ import annotations

from rich.console import Console

FILE_WIDTH = 200
"""Columns of characters when a table does not go to a terminal."""


def table_console() -> Console:
    """A console as wide as the terminal, or wide enough for any table in a file."""
    console = Console()
    return console if console.is_terminal else Console(width=FILE_WIDTH)
