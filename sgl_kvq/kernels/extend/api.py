"""Extend attention over a quantized cache: the operation that callers use on a GPU."""

from __future__ import annotations

import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.kernels.append.touched import TouchedPages
from sgl_kvq.kernels.common.page_spec import page_spec
from sgl_kvq.kernels.extend.configs import prefill_head_dim
from sgl_kvq.kernels.extend.kernel import _copy_rows_kernel, _dequantize_pages_kernel
from sgl_kvq.kernels.extend.merge import merge
from sgl_kvq.kernels.extend.passes import AttentionPass, ScratchFills
from sgl_kvq.kernels.extend.prefill_attention import PrefillAttention
from sgl_kvq.memory_pool.storage import PagedCache

FILL_PROGRAMS = 128  # for each head, K and V: more blocks than run at once on any GPU


class ExtendWorkspace:
    """Scratch buffer for K and V in 16 bits, reused by every pass and layer (one stream only).

    Args:
        layout: Of the pages.
        num_pages: Pages it holds at first.
        device: Where it lives.
    """

    def __init__(self, layout: PageLayout, num_pages: int, device: torch.device | str) -> None:
        self._layout = layout
        self._device = device
        self._allocate(num_pages)

    def _allocate(self, num_pages: int) -> None:
        layout = self._layout
        dim = prefill_head_dim(layout.head_dim)
        shape = (2, num_pages * PAGE_SIZE, layout.num_kv_heads, dim)
        # Zeros: channels beyond head_dim are never written and must not count.
        self.kv = torch.zeros(shape, dtype=layout.row_dtype, device=self._device)

    def reserve(self, num_pages: int) -> bool:
        """Make room for `num_pages`; True if the buffer had to move."""
        if num_pages * PAGE_SIZE <= self.kv.shape[1]:
            return False
        self._allocate(num_pages)
        return True


def fill_scratch(
    cache: PagedCache,
    layout: PageLayout,
    k: torch.Tensor,
    v: torch.Tensor,
    fills: ScratchFills,
    touched: TouchedPages,
    prior_rows: torch.Tensor,
    workspace: ExtendWorkspace,
) -> None:
    """Write pages to the scratch buffer: dequantized codes, or 16-bit rows as they are.

    Args:
        cache: The layer's storage; sink tokens come from its 16-bit rows.
        layout: Of the pages.
        k: [tokens, num_kv_heads, head_dim] of `layout.row_dtype`, channels contiguous.
        v: Like k.
        fills: What goes where.
        touched: The step's touched pages.
        prior_rows: [m, 2, PAGE_SIZE, num_kv_heads, head_dim], earlier rows of resumed pages.
        workspace: Written.
    """
    keys, values = workspace.kv
    options = {"OUT_DIM": keys.shape[2], "SPEC": page_spec(layout), "num_warps": 4}
    heads = layout.num_kv_heads
    if len(fills.touched):
        _copy_rows_kernel[(len(fills.touched), heads, 2)](
            k, v, k.stride(0), k.stride(1), v.stride(0), v.stride(1), fills.touched,
            fills.row_targets, touched.prior, touched.first, touched.end, touched.start,
            prior_rows, keys, values, **options,
        )  # fmt: skip
    if len(fills.pages):
        _dequantize_pages_kernel[(min(len(fills.pages), FILL_PROGRAMS), heads, 2)](
            fills.pages, fills.sink_pages, fills.targets, fills.num_pages,
            cache.pages, cache.sink_rows, keys, values,
            SINKS=cache.sink_tokens, enable_fp_fusion=False, **options,
        )  # fmt: skip


def extend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: PagedCache,
    layout: PageLayout,
    passes: list[AttentionPass],
    fills: list[ScratchFills],
    touched: TouchedPages,
    prior_rows: torch.Tensor,
    attention: PrefillAttention,
    workspace: ExtendWorkspace,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Causal attention of fresh tokens over their whole sequences.

    Pages of codes are dequantized to 16 bits into a buffer of bounded size, a pass at a time: a
    matrix product of many rows is bound by the tensor cores, for which 16-bit kernels are fast, and
    dequantizing is a few percent of it.

    Args:
        q: [tokens, num_qo_heads, head_dim] of `layout.row_dtype`, after RoPE, requests one after
            the other.
        k: [tokens, num_kv_heads, head_dim], likewise.
        v: Like k.
        cache: The layer's storage, with this step's rows appended.
        layout: Of the pages.
        passes: From `plan_passes`, planned by `attention`.
        fills: What each pass writes to the scratch buffer.
        touched: Pages that got rows in this step.
        prior_rows: [m, 2, PAGE_SIZE, num_kv_heads, head_dim], rows that resumed pages held before.
        attention: Runs the passes.
        workspace: Scratch buffer.
        out: Like q, contiguous, written; None: a new one.

    Returns:
        (out, lse float32 [tokens, num_qo_heads] in log base 2, or None if no pass merges).
    """
    head_dim = q.shape[2]
    padding = workspace.kv.shape[3] - head_dim
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if padding:
        q = torch.nn.functional.pad(q, (0, padding))
    padded = torch.empty_like(q) if padding else out
    lse = None
    if any(step.merges for step in passes):
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    keys, values = workspace.kv
    for index, (step, fill) in enumerate(zip(passes, fills, strict=True)):
        fill_scratch(cache, layout, k, v, fill, touched, prior_rows, workspace)
        rows = slice(step.q_begin, step.q_end)
        own_lse = None if lse is None else lse[rows]
        if own_lse is None or not step.merges:
            attention.run(index, step, q[rows], keys, values, padded[rows], own_lse)
            continue
        other, other_lse = torch.empty_like(padded[rows]), torch.empty_like(own_lse)
        attention.run(index, step, q[rows], keys, values, other, other_lse)
        merge(padded[rows], own_lse, other, other_lse)
    if padding:
        out.copy_(padded[..., :head_dim])
    return out, lse
