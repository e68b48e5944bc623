"""How far extend is from float64 attention, on the random rows of `kernel_errors`."""

from __future__ import annotations

import math

import torch

from sgl_kvq.commands.check.samples import GQA_GROUP, SEQ_LENS, Sample
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.page_layout import PageLayout
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
    k, v = (rows[is_fresh.to(device)] for rows in (sample.k, sample.v))
    attend = _by_kernel if use_kernels else _by_pytorch
    out = attend(q.to(device), k, v, cache, layout, sample).cpu().double()
    exact = _exact(q.double(), layout, sample, seen)
    return float((out - exact).norm() / exact.norm())


def _by_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: PagedCache,
    layout: PageLayout,
    sample: Sample,
) -> torch.Tensor:
    from sgl_kvq.attention.plan.extend import plan_extend
    from sgl_kvq.attention.plan.upload import upload_extend
    from sgl_kvq.kernels.append.api import append
    from sgl_kvq.kernels.extend.api import ExtendWorkspace, extend
    from sgl_kvq.kernels.extend.configs import prefill_head_dim
    from sgl_kvq.kernels.extend.flashinfer_attention import FlashInferAttention

    device, sm_scale = q.device, layout.head_dim**-0.5
    fresh_lens = [n - prefix for n, prefix in zip(SEQ_LENS, PREFIX_LENS, strict=True)]
    workspace = ExtendWorkspace(layout, len(sample.pages), device)
    plan = plan_extend(list(PREFIX_LENS), fresh_lens, False, len(sample.pages))
    workspace.reserve(plan.scratch_pages)
    attention = FlashInferAttention(
        q.shape[1],
        layout.num_kv_heads,
        prefill_head_dim(layout.head_dim),
        layout.row_dtype,
        sm_scale,
        device,
    )
    attention.plan(plan.passes)
    req_to_token, slots = _tables(sample, len(cache.pages), device)
    rows = torch.arange(1, len(SEQ_LENS) + 1, device=device)
    batch = upload_extend(plan, req_to_token, rows, slots)
    prior_rows = batch.prior_rows(cache)
    contained = torch.zeros((), dtype=torch.int64, device=device)
    append(cache, layout, k, v, batch.touched, contained, prior_rows)
    return extend(
        q, k, v, cache, layout, batch.passes, batch.fills, batch.touched, prior_rows,
        attention, workspace,
    )[0]  # fmt: skip


def _tables(sample: Sample, num_pages: int, device: torch.device) -> tuple[torch.Tensor, SlotMaps]:
    """SGLang's table of tokens, a row a sequence (row 0 is padding), and the pages' slots."""
    req_to_token = torch.zeros((len(SEQ_LENS) + 1, max(SEQ_LENS) + PAGE_SIZE), dtype=torch.int32)
    slot_of = torch.zeros((2, num_pages), dtype=torch.int64)
    for request, pages in enumerate(sample.pages_of()):
        tokens = (pages[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()
        req_to_token[request + 1, : len(tokens)] = tokens
        slot_of[0, pages[-1]] = slot_of[1, pages[0]] = request + 1
    return req_to_token.to(device), SlotMaps(*slot_of.to(device))


def _by_pytorch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: PagedCache,
    layout: PageLayout,
    sample: Sample,
) -> torch.Tensor:
    from sgl_kvq.kernels.extend.reference import ExtendRequest, extend

    requests: list[ExtendRequest] = []
    touched: list[torch.Tensor] = []
    q_start = 0
    for request, pages in enumerate(sample.pages_of()):
        prefix, seq_len = PREFIX_LENS[request], SEQ_LENS[request]
        requests.append(
            ExtendRequest(
                prefix,
                seq_len,
                q_start,
                pages[: prefix // PAGE_SIZE],
                len(touched),
                sink_slot=request + 1,
            )
        )
        rows = torch.stack([k, v])[:, q_start : q_start + seq_len - prefix]
        pad = -(seq_len - prefix) % PAGE_SIZE
        padded = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, pad))
        touched += padded.unflatten(1, (-1, PAGE_SIZE)).unbind(1)
        q_start += seq_len - prefix
    return extend(
        q,
        cache.pages,
        torch.stack(touched),
        cache.sink_rows,
        requests,
        layout,
        layout.head_dim**-0.5,
        quantized_prefill=False,
    )


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
