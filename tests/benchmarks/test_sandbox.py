"""Programs that do what a model's program must not do."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.tasks.sandbox import passes

IS_REFUSED = """
try:
    {action}
except (PermissionError, MemoryError):
    pass
else:
    raise AssertionError
"""


def test_a_program_that_runs_to_its_end_passes() -> None:
    assert passes("import math, typing\nprint(input) or open(__file__) if 0 else math.pi\n")
    assert passes("import numpy\nassert numpy.arange(3).sum() == 3")
    assert not passes("assert 1 == 2")
    assert not passes("def unfinished(:")
    assert not passes("raise SystemExit(0)")
    assert not passes("import os\nos._exit(0)")
    assert not passes("input()")


@pytest.mark.parametrize(
    "action",
    [
        "import os; os.fork() or os._exit(0)",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
        "import os; os.kill(os.getppid(), 0)",
        "import socket; socket.create_connection(('127.0.0.1', 1))",
        "import os; os.remove('program.py')",
        "import shutil; shutil.rmtree('.')",
        "open('program.py', 'a')",
        "import os; os.open('new', os.O_CREAT)",
        "import pathlib; pathlib.Path('new').write_text('')",
        "bytearray(2 * 2**30)",
    ],
)
def test_what_reaches_beyond_the_process_is_refused(action: str) -> None:
    assert not passes(action)
    assert passes(IS_REFUSED.format(action=action))


def test_nothing_is_written(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    assert not passes(f"open({str(kept)!r}, 'w').write('changed')")
    assert not passes(f"import os; os.truncate({str(kept)!r}, 0)")
    assert not passes(f"import os; os.rename({str(kept)!r}, {str(tmp_path / 'new')!r})")
    assert not passes(f"import os; os.mkdir({str(tmp_path / 'folder')!r})")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["as it was"]


def test_a_loop_and_a_sleep_end() -> None:
    begin = time.monotonic()
    assert not passes("while True: pass", cpu_s=1, wall_s=180.0)
    assert not passes("import time; time.sleep(180)", wall_s=2.0)
    assert time.monotonic() - begin < 180


def test_output_without_end_fills_no_memory() -> None:
    assert not passes("while True: print('x' * 1000)", cpu_s=1)
