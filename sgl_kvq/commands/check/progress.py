"""What `python -m sgl_kvq check` is doing now, while kernels compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@contextmanager
def show_progress(console: Console) -> Iterator[Callable[[str], None]]:
    """Show the operation that runs.

    On a terminal it is one line at the bottom, with the seconds since it began; elsewhere, as in a
    log file, every operation gets a line when it begins.

    Yields:
        A function that takes the operation that begins now.
    """
    if not console.is_terminal:
        yield lambda operation: console.print(f"...  {operation}", markup=False)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        yield lambda operation: progress.reset(task, description=operation)
