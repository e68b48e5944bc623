"""The decode kernel without its arithmetic: what loading the pages alone costs."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton.language as tl

from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.kernels.common.gluon import async_copy, gl, jit
from sgl_kvq.kernels.common.page_spec import page_spec
from sgl_kvq.kernels.decode.api import DecodeWorkspace
from sgl_kvq.kernels.decode.page_buffers import allocate_page, start_page
from sgl_kvq.memory_pool.storage import PagedCache, PageTable


@jit
def _load_only_kernel(
    pages_ptr, kv_indices_ptr, num_pages, STAGES: tl.constexpr, SPEC: tl.constexpr
):
    """Bring every closed page of every head into shared memory, with the decode kernel's copies."""
    units = num_pages.to(gl.int64) * SPEC.num_kv_heads
    first = gl.program_id(0) * units // gl.num_programs(0)
    end = (gl.program_id(0) + 1) * units // gl.num_programs(0)
    buffers = allocate_page(STAGES, SPEC)
    stage = 0
    for unit in range(first, end):
        page = gl.load(kv_indices_ptr + unit // SPEC.num_kv_heads).to(gl.int64)
        head_ptr = pages_ptr + page * SPEC.page_bytes + unit % SPEC.num_kv_heads * SPEC.head_bytes
        start_page(buffers, stage, head_ptr, unit < end, SPEC)
        async_copy.wait_group(STAGES - 1)
        stage = stage + 1 if stage + 1 < STAGES else 0
    async_copy.wait_group(0)


def load_only(cache: PagedCache, table: PageTable, layout: PageLayout, ws: DecodeWorkspace) -> None:
    """Run the loads of a decode call.

    Args:
        cache: The pages.
        table: Which of them.
        layout: Layout of the pages.
        ws: Workspace of the decode call; its launch configuration is used.
    """
    _load_only_kernel[(ws.num_programs,)](
        cache.pages, table.kv_indices, len(table.kv_indices), STAGES=ws.num_stages,
        SPEC=page_spec(layout), num_warps=1,
    )  # fmt: skip


def few_pages(table: PageTable, num_pages: int = 64) -> PageTable:
    """The same table over a handful of pages, which stay in the L2 cache: arithmetic alone."""
    indices = torch.randint(1, num_pages + 1, table.kv_indices.shape, device="cuda")
    return replace(table, kv_indices=indices.int())
