"""Programs of a model, run apart and under limits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from benchmarks.tasks import sandbox_child

CPU_S = 5
WALL_S = 30.0
"""Longer than `CPU_S`, which ends a program that computes: grades do not depend on other load."""
MEMORY_BYTES = 2**30


def passes(source: str, cpu_s: int = CPU_S, wall_s: float = WALL_S) -> bool:
    """Run a program in a process of its own and say whether it ran to its end.

    It may not write files, start processes or use the network, has `MEMORY_BYTES` of memory, and
    its input is empty (`sandbox_child`). This stops accidents, not an attacker.

    Args:
        source: Python.
        cpu_s: Seconds of processor time until it is killed.
        wall_s: Seconds until it is killed.
    """
    command = [sys.executable, "-I", "-B", sandbox_child.__file__, str(cpu_s), str(MEMORY_BYTES)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.py"
        path.write_text(source)
        process = subprocess.Popen(
            [*command, str(path)],
            cwd=folder,
            env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(wall_s) == sandbox_child.PASSED
        except subprocess.TimeoutExpired:
            return False
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
