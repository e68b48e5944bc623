"""How many threads a small decode step should use on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Pages x KV heads x channels up to which one thread is faster than two: waking the second one
# costs more than its half of the work (batch 1, 2,048 tokens, SmolLM2 on a 2-core Xeon,
# 2026-11-22: 3.4 against 4.2 ms a layer; batch 8, 1,024 tokens: 13.7 against 12.7).
SMALL_STEP = 8192


@contextmanager
def one_thread_if(small: bool) -> Iterator[None]:
    """Run the block on one PyTorch thread if the step is small; free to enter otherwise."""
    threads = torch.get_num_threads()
    if not small or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
