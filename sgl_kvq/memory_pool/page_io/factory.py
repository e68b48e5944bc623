"""Chooses the access that fits where a pool lies."""

from __future__ import annotations

from typing import Any

from sgl_kvq.memory_pool.page_io.base import PoolAccess
from sgl_kvq.memory_pool.page_io.cpu import CpuPoolAccess
from sgl_kvq.memory_pool.page_io.cuda import CudaPoolAccess
from sgl_kvq.memory_pool.page_io.span import HeadRange
from sgl_kvq.memory_pool.store import PagedStore


def open_pool(pool: PagedStore, heads: HeadRange, forward_stream: Any = None) -> PoolAccess:
    """Make the access to a rank's pool.

    Args:
        pool: The pool of this rank.
        heads: KV heads it holds.
        forward_stream: CUDA stream that the model runs on; None for the current one.
    """
    if str(pool.device).startswith("cpu"):
        return CpuPoolAccess(pool, heads)
    return CudaPoolAccess(pool, heads, forward_stream)
