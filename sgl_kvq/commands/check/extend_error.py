"""How far extend is from float64 attention, on the random rows of `kernel_errors`."""

from __future__ import annotations

import math

import torch

from sgl_kvq.attention.plan.extend import closed_fill, plan_extend
from sgl_kvq.attention.plan.passes import plan_passes, scratch_pages_of
from sgl_kvq.attention.plan.upload import ExtendBatch, upload_extend
from sgl_kvq.commands.check.samples import GQA_GROUP, SEQ_LENS, Sample
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.kernels.extend.passes import ExtendPlan, FillPlan
from sgl_kvq.memory_pool.storage import PagedCache, SlotMaps

PREFIX_LENS = (0, 0, 128, 640)
"""Tokens of each sequence that count as cached; the others are fresh."""


def extend_error(
    cache: PagedCache,
    layout: PageLayout,
    sample: Sample,
    seen: torch.Tensor,
    use_kernels: bool,
) -> float:
    """Attend from the fresh tokens of every sequence, as in a chunk of a prefill.

    Args:
        cache: With all rows of the sample appended; the fresh ones are appended again.
        layout: Of the pages.
        sample: The rows.
        seen: float64 [2, tokens, num_kv_heads, head_dim] on the host, K and V as read from closed
            pages, sink rows exact.
        use_kernels: The GPU kernels, or PyTorch.

    Returns:
        ||out - exact|| / ||exact||.
    """
    is_fresh = torch.cat(
        [torch.arange(n) >= prefix for n, prefix in zip(SEQ_LENS, PREFIX_LENS, strict=True)]
    )
    q = torch.randn(
        (int(is_fresh.sum()), layout.num_kv_heads * GQA_GROUP, layout.head_dim),
        generator=torch.Generator().manual_seed(2),
    ).to(layout.row_dtype)
    device = cache.pages.device
    q_device = q.to(device)
    k, v = (rows[is_fresh.to(device)] for rows in (sample.k, sample.v))
    fresh_lens = [n - prefix for n, prefix in zip(SEQ_LENS, PREFIX_LENS, strict=True)]
    plan = plan_extend(list(PREFIX_LENS), fresh_lens, quantized_prefill=False)
    attend = _by_kernel if use_kernels else _by_pytorch
    out = attend(q_device, k, v, cache, layout, plan, sample).cpu().double()
    exact = _exact(q.double(), layout, sample, seen)
    return float((out - exact).norm() / exact.norm())


def _by_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: PagedCache,
    layout: PageLayout,
    plan: ExtendPlan,
    sample: Sample,
) -> torch.Tensor:
    from sgl_kvq.host import flash_attention_3
    from sgl_kvq.kernels.append.api import append
    from sgl_kvq.kernels.extend.api import ExtendWorkspace, extend
    from sgl_kvq.kernels.extend.configs import prefill_head_dim
    from sgl_kvq.kernels.extend.prefill_attention import AttentionShape

    device = q.device
    passes = plan_passes(plan.requests, len(sample.pages))
    workspace = ExtendWorkspace(layout, scratch_pages_of(passes), device)
    shape = AttentionShape(
        q.shape[1],
        layout.num_kv_heads,
        prefill_head_dim(layout.head_dim),
        layout.row_dtype,
        layout.head_dim**-0.5,
    )
    attention = flash_attention_3.make_prefill_attention(shape, device)
    attention.plan(passes)
    batch = _upload(plan, [one_pass.fills for one_pass in passes], cache, sample)
    prior_rows = batch.prior_rows(cache)
    num_nonfinite = torch.zeros((), dtype=torch.int64, device=device)
    append(cache, layout, k, v, batch.touched, num_nonfinite, prior_rows)
    return extend(
        q, k, v, cache, layout, passes, batch.fills, batch.touched, prior_rows, attention,
        workspace,
    )[0]  # fmt: skip


def _by_pytorch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: PagedCache,
    layout: PageLayout,
    plan: ExtendPlan,
    sample: Sample,
) -> torch.Tensor:
    from sgl_kvq.kernels.append.cpu import append_extend, plan_append_extend
    from sgl_kvq.kernels.extend.reference import extend

    closed = [closed_fill(request, 0, request.num_closed, 0) for request in plan.requests]
    batch = _upload(plan, closed, cache, sample)
    append = plan_append_extend(batch.touched, batch.resumed_slots)
    rows, _ = append_extend(cache, layout, k, v, append)
    return extend(q, cache, layout, plan.requests, batch.fills, rows, layout.head_dim**-0.5)


def _upload(
    plan: ExtendPlan, fills: list[FillPlan], cache: PagedCache, sample: Sample
) -> ExtendBatch:
    """Look the pages up in tables like SGLang's, a row a sequence (row 0 is padding)."""
    device = cache.pages.device
    req_to_token = torch.zeros((len(SEQ_LENS) + 1, max(SEQ_LENS) + PAGE_SIZE), dtype=torch.int32)
    slot_of = torch.zeros((2, len(cache.pages)), dtype=torch.int64)
    for request, pages in enumerate(sample.pages_of()):
        tokens = (pages[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()
        req_to_token[request + 1, : len(tokens)] = tokens
        slot_of[0, pages[-1]] = slot_of[1, pages[0]] = request + 1
    rows = torch.arange(1, len(SEQ_LENS) + 1, device=device)
    slots = SlotMaps(*slot_of.to(device))
    return upload_extend(plan, fills, rows, req_to_token.to(device), slots)


def _exact(q: torch.Tensor, layout: PageLayout, sample: Sample, seen: torch.Tensor) -> torch.Tensor:
    """float64 like q: the prefix as read from pages, fresh rows as they are."""
    exact = torch.stack([sample.k.cpu(), sample.v.cpu()]).double()
    out, q_start, start = [], 0, 0
    for seq_len, prefix in zip(SEQ_LENS, PREFIX_LENS, strict=True):
        rows = exact[:, start : start + seq_len].clone()
        rows[:, :prefix] = seen[:, start : start + prefix]
        keys, values = rows
        fresh = seq_len - prefix
        grouped = q[q_start : q_start + fresh].unflatten(1, (layout.num_kv_heads, -1))
        scores = torch.einsum("qhgd,thd->hgqt", grouped, keys) / math.sqrt(layout.head_dim)
        future = torch.ones(fresh, seq_len).tril(prefix) == 0
        probabilities = scores.masked_fill(future, -torch.inf).softmax(-1)
        out.append(torch.einsum("hgqt,thd->qhgd", probabilities, values).flatten(1, 2))
        q_start, start = q_start + fresh, start + seq_len
    return torch.cat(out)
