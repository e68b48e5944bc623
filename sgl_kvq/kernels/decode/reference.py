"""Decode attention over quantized pages in plain torch and float64: the specification.

out = softmax(sm_scale * q K^T) V over what a request reads: its closed pages, dequantized, with
their first `sink_tokens` rows taken from the 16-bit sink rows, then the 16-bit rows of its last
page. Kernels and the CPU path compute the same from the codes and are tested against this file.
"""

from __future__ import annotations

import math

import torch

from sgl_kvq.formats.base import partition_size
from sgl_kvq.formats.dequantize import decode_keys, decode_values, unpack_planes
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.memory_pool.storage import PagedCache, PageTable


def read_sequence(
    cache: PagedCache, table: PageTable, layout: PageLayout, request: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather K and V of one request, each float64 [seq_len, num_kv_heads, head_dim]."""
    first, end = table.kv_indptr[request : request + 2].tolist()
    pages = cache.pages[table.kv_indices[first : end - 1].long()]
    closed = torch.stack([decode_keys(pages, layout), decode_values(pages, layout)])
    closed = closed.double().transpose(2, 3).flatten(1, 2)  # [2, tokens, H, D]
    if len(pages):
        closed[:, : cache.sink_tokens] = cache.sink_rows[table.sink_pages[request]].double()
    opened = cache.open_rows[table.open_slots[request], :, : table.kv_last_page_len[request]]
    k, v = torch.cat([closed, opened.double()], dim=1)
    return k, v


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query over the rows of its request, in float64.

    Args:
        q: [num_qo_heads, head_dim]; query heads of a KV head are adjacent.
        k: [tokens, num_kv_heads, head_dim].
        v: Like k.
        sm_scale: Factor on the scores.

    Returns:
        (out like q, lse [num_qo_heads] in log base 2), both float64.
    """
    grouped = q.double().unflatten(0, (k.shape[1], -1))
    scores = torch.einsum("hgd,thd->hgt", grouped, k.double()) * sm_scale
    out = torch.einsum("hgt,thd->hgd", scores.softmax(-1), v.double())
    return out.flatten(0, 1), scores.logsumexp(-1).flatten() / math.log(2)


def decode(
    q: torch.Tensor, cache: PagedCache, table: PageTable, layout: PageLayout, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query a request over its whole cached sequence.

    Args:
        q: [batch, num_qo_heads, head_dim], after RoPE.
        cache: The layer's storage; each request's newest row is already in its open slot.
        table: Pages of each request.
        layout: Layout of the pages.
        sm_scale: Factor on the scores.

    Returns:
        (out like q, lse [batch, num_qo_heads] in log base 2), both float64.
    """
    results = [
        attend(row, *read_sequence(cache, table, layout, request), sm_scale)
        for request, row in enumerate(q)
    ]
    return torch.stack([out for out, _ in results]), torch.stack([lse for _, lse in results])


def quantize_left(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round the left factor of a product to 8 bits along its last dimension: x ~ step * a + low.

    Args:
        x: [..., n].

    Returns:
        a [..., n], whole numbers from 0 to 255; step and low, each [..., 1]; all float64.
    """
    x = x.double()
    low = x.amin(-1, keepdim=True)
    step = (x.amax(-1, keepdim=True) - low) / 255
    step = torch.where(step > 0, step, 1.0)
    return ((x - low) / step).round(), step, low


def hack_integer_scores(q: torch.Tensor, rows: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Scores by HACK's homomorphic arithmetic: 8-bit queries times codes, and sums of the codes.

    With u ~ step * a + low in a partition, sum_c u_c code_tc = step * (a . code_t) + low * (sum of
    code_t). On the channel axis u = q * scale and the minima meet q itself; on the token axis
    u = q, and scale and minimum move outside the sum. No kernel computes this: they multiply 16-bit
    queries. HACK stores the sums, here they are computed.

    Args:
        q: [N, num_kv_heads, gqa_group, head_dim], unrotated.
        rows: uint8 [N, page_bytes], without outlier channels.
        layout: Layout of the rows.

    Returns:
        float64 [N, num_kv_heads, gqa_group, PAGE_SIZE], without `sm_scale`.

    Source: HACK (arXiv 2502.03589) equation 4 and its ATC '26 form for per-channel K.
    """
    coding = layout.format.k
    size = partition_size(layout.head_dim)
    scales, mins = (layout.view(rows, name).double() for name in ("k_scales", "k_mins"))
    codes = unpack_planes(layout.view(rows, "k_codes"), coding.num_planes, -1).double()
    codes = codes.unflatten(-1, (-1, size)).permute(0, 1, 3, 4, 2)  # [N, H, partitions, size, P]
    per_channel = coding.axis == "channel"
    left = q.double() * scales.unsqueeze(2) if per_channel else q.double()
    a, step, low = quantize_left(left.unflatten(-1, (-1, size)).transpose(2, 3))
    products = step * (a @ codes) + low * codes.sum(-2, keepdim=True)  # [N, H, partitions, G, P]
    if per_channel:
        return products.sum(2) + (q.double() * mins.unsqueeze(2)).sum(-1, keepdim=True)
    left_sums = step * a.sum(-1, keepdim=True) + size * low
    return (products * scales.unsqueeze(3) + left_sums * mins.unsqueeze(3)).sum(2)
