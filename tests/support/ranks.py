"""Tensor-parallel ranks, a process each."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from testbed.servers import free_port


def run_ranks(tp_size: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """Run a function in a process for each rank; what each returned.

    Args:
        tp_size: How many.
        body: Of a module; called with rank, the fields of `ServerArgs` that make the ranks one
            server, and `args`.
        args: Pickled.

    Raises:
        torch.multiprocessing.ProcessRaisedException: of the first rank that failed.
    """
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    options = {"tp_size": tp_size, "nccl_port": free_port()}
    ranks = torch.multiprocessing.spawn(
        _rank, (body, options, args, results), nprocs=tp_size, join=False
    )
    found = {}
    ended = False
    while not ended:
        ended = ranks.join(timeout=1)
        while not results.empty():
            rank, result = results.get()
            found[rank] = result
    return [found[rank] for rank in range(tp_size)]


def _rank(rank: int, body: Callable[..., Any], options: Any, args: Any, results: Any) -> None:
    if not torch.cuda.is_available():  # SGLang asks for cores, and uses NCCL if it finds one
        cores = "|".join(str(core) for core in range(options["tp_size"]))
        os.environ |= {"SGLANG_CPU_OMP_THREADS_BIND": cores, "SGLANG_NCCL_SO_PATH": "/none"}
    results.put((rank, body(rank, options, *args)))
