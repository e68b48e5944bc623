"""The yardstick of `bench_wire` runs and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys


def test_bare_loop_ends_and_leaves_no_process() -> None:
    """In a process of its own: it forks, and this one may have threads."""
    code = (
        "import multiprocessing\n"
        "from benchmarks.wire.bare import bare_loop\n"
        "with bare_loop(2**20) as bare:\n"
        "    for size, count, walk in ((1000, 300, 0), (300_000, 40, 2_000_000)):\n"
        "        assert 0 < bare.transfer(size, count, walk) < 20\n"
        "assert not multiprocessing.active_children()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
