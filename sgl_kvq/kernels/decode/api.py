"""Decode attention over a quantized cache: the operation that callers use on a GPU."""

from __future__ import annotations

import math

import torch

from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.kernels.common.page_spec import page_spec
from sgl_kvq.kernels.common.rotation import rotate_rows
from sgl_kvq.kernels.decode.configs import decode_config, merge_config, tail_units
from sgl_kvq.kernels.decode.kernel import _decode_fwd_kernel, _decode_merge_kernel
from sgl_kvq.memory_pool.storage import PagedCache, PageTable

LOG2_E = math.log2(math.e)
MAX_REGISTERS = 248  # two warps a scheduler


class DecodeWorkspace:
    """Memory for the partial results of a decode call, reused by every layer (one stream only).

    Args:
        max_batch: Largest batch.
        num_qo_heads: Query heads.
        layout: Layout of the pages.
        device: A GPU, or "cpu" under Triton's interpreter.
        num_programs: Pieces that the work is cut into; None for as many as fill the device.
    """

    def __init__(
        self,
        max_batch: int,
        num_qo_heads: int,
        layout: PageLayout,
        device: torch.device | str,
        num_programs: int | None = None,
    ) -> None:
        device = torch.device(device)
        self.gqa_group = num_qo_heads // layout.num_kv_heads
        if num_qo_heads % layout.num_kv_heads or not 1 <= self.gqa_group <= 16:
            raise ValueError(
                f"num_qo_heads: expected 1 to 16 times the {layout.num_kv_heads} KV heads, "
                f"got {num_qo_heads}"
            )
        self.max_batch = max_batch
        self.padded_heads = 8 if self.gqa_group <= 8 else 16
        config = decode_config(page_spec(layout), device)
        self.num_stages = config.num_stages
        self.use_pdl = config.use_pdl
        self.num_programs = num_programs or config.num_programs
        slots = self.num_programs + max_batch * layout.num_kv_heads
        out_shape = (slots, self.gqa_group, layout.head_dim)
        self.out = torch.empty(out_shape, dtype=torch.float32, device=device)
        self.stats = torch.empty((slots, 2, self.gqa_group), dtype=torch.float32, device=device)


def decode(
    q: torch.Tensor,
    cache: PagedCache,
    table: PageTable,
    layout: PageLayout,
    sm_scale: float,
    workspace: DecodeWorkspace,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query a request over its whole cached sequence.

    Scores and values are computed from the codes in registers. Nothing waits for the device, so the
    call can be captured in a CUDA graph; a replay reads the page table anew.

    Args:
        q: [batch, num_qo_heads, head_dim] of `layout.row_dtype`, after RoPE, last dim contiguous.
        cache: The layer's storage. The newest row is already in its open slot, unless it is fresh.
        table: Pages of each request, at least one.
        layout: Layout of the pages.
        sm_scale: Factor on the scores.
        workspace: For at least this batch.
        out: Like q, contiguous, written; None: a new one.
        lse: float32 [batch, num_qo_heads], written; None: a new one.
        fresh: (k, v), each [batch, num_kv_heads, head_dim] of `layout.row_dtype` after RoPE,
            channels contiguous: the newest row of each request, which this call stores in the open
            slot. It spares a launch before attention.

    Returns:
        (out, lse), lse in log base 2 as FlashInfer's.

    Raises:
        ValueError: wrong shape or dtype.

    Source: split-KV as in Flash-Decoding; scaling the query by the key scales as in KIVI and HACK.
    """
    batch, num_qo_heads, head_dim = q.shape
    k, v = (q, q) if fresh is None else fresh
    for name, rows in (("q", q), ("k", k), ("v", v)):
        if len(rows) > workspace.max_batch or rows.dtype != layout.row_dtype or rows.stride(2) != 1:
            raise ValueError(
                f"{name}: expected at most {workspace.max_batch} rows of {layout.row_dtype} with "
                f"contiguous channels, got {len(rows)} of {rows.dtype} with stride {rows.stride(2)}"
            )
    spec = page_spec(layout)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if lse is None:
        lse = torch.empty((batch, num_qo_heads), dtype=torch.float32, device=q.device)
    q_codes = rotate_rows(q, spec.k.rotation) if spec.k.rotation > 1 else q
    gqa, tail = workspace.gqa_group, tail_units(cache.sink_tokens)
    _decode_fwd_kernel[(workspace.num_programs,)](
        q, q_codes, q.stride(0), q.stride(1), q_codes.stride(0), q_codes.stride(1),
        k, v, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        cache.pages, cache.open_rows, cache.sink_rows,
        table.kv_indptr, table.kv_indices, table.kv_last_page_len, table.open_slots,
        table.sink_pages, workspace.out, workspace.stats, batch, sm_scale * LOG2_E,
        FRESH=fresh is not None, SINKS=cache.sink_tokens, HEADS=workspace.padded_heads, GQA=gqa,
        STAGES=workspace.num_stages, TAIL=tail, PDL=workspace.use_pdl, SPEC=spec,
        num_warps=1, maxnreg=MAX_REGISTERS, launch_pdl=workspace.use_pdl,
    )  # fmt: skip
    merging = merge_config(workspace.num_programs, batch * layout.num_kv_heads)
    _decode_merge_kernel[(batch, num_qo_heads)](
        workspace.out, workspace.stats, table.kv_indptr, out, lse, batch, workspace.num_programs,
        GQA=gqa, HEAD_DIM=head_dim, KV_HEADS=layout.num_kv_heads, TAIL=tail,
        BLOCK_D=1 << (head_dim - 1).bit_length(), BLOCK_S=merging.block_slots,
        PDL=workspace.use_pdl, num_warps=merging.num_warps, launch_pdl=workspace.use_pdl,
    )  # fmt: skip
    return out, lse
