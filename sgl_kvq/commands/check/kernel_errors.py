"""How far append, decode and extend are from their specification, on random rows of this device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sgl_kvq.commands.check.extend_error import extend_error
from sgl_kvq.commands.check.samples import GQA_GROUP, SEQ_LENS, SINK_TOKENS, Sample, make_sample
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.dequantize import decode_keys, decode_values
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.quantize import encode_pages
from sgl_kvq.kernels.append.touched import TouchedPages
from sgl_kvq.memory_pool.storage import PagedCache, PageTable, sink_rows_of


@dataclass(frozen=True)
class KernelErrors:
    """What was measured on one format.

    Args:
        wrong_bytes: Bytes of closed pages that differ from `encode_pages` on the CPU.
        total_bytes: Bytes compared.
        decode_error: ||out - exact|| / ||exact|| of decode attention, exact being float64
            attention over the dequantized pages and the 16-bit rows.
        extend_error: Likewise of extend.
    """

    wrong_bytes: int
    total_bytes: int
    decode_error: float
    extend_error: float


def measure(
    layout: PageLayout,
    device: str,
    use_kernels: bool,
    report: Callable[[str], None] = lambda operation: None,
) -> KernelErrors:
    """Append random rows and attend to them.

    Args:
        layout: Of the pages.
        device: "cuda", or "cpu".
        use_kernels: The GPU kernels (on "cpu" under Triton's interpreter only), or PyTorch.
        report: Called with the name of each operation before it runs.
    """
    sample = make_sample(layout, device)
    cache = _empty_cache(layout, sample, device)
    report("append")
    _append(cache, layout, sample, use_kernels)
    _keep_full_last_pages(cache, sample)
    expected = _expected_pages(layout, sample)
    full = [i for i, length in enumerate(sample.lengths) if length == PAGE_SIZE]
    found = cache.pages[sample.pages[full].to(device)].cpu()
    report("decode")
    table = _page_table(sample, device)
    q = torch.randn(
        (len(SEQ_LENS), layout.num_kv_heads * GQA_GROUP, layout.head_dim),
        generator=torch.Generator().manual_seed(1),
    ).to(layout.row_dtype)
    out = _decode(q.to(device), cache, table, layout, use_kernels).cpu()
    seen = _as_read(layout, sample, expected)
    exact = _exact_attention(q, layout, sample, seen)
    difference = (out.double() - exact).norm() / exact.norm()
    report("extend")
    return KernelErrors(
        wrong_bytes=int((found != expected).sum()),
        total_bytes=expected.numel(),
        decode_error=float(difference),
        extend_error=extend_error(cache, layout, sample, seen, use_kernels),
    )


def _slots(owns_one: list[bool]) -> torch.Tensor:
    """int64 like `owns_one`: 1, 2, ... for pages that own a slot, 0 for others."""
    owners = torch.tensor(owns_one)
    return owners.cumsum(0) * owners


def _empty_cache(layout: PageLayout, sample: Sample, device: str) -> PagedCache:
    rows = (layout.num_kv_heads, layout.head_dim)
    slots = len(SEQ_LENS) + 1
    return PagedCache(
        pages=torch.zeros(
            (int(sample.pages.max()) + 1, layout.page_bytes), dtype=torch.uint8, device=device
        ),
        open_rows=torch.zeros((slots, 2, PAGE_SIZE, *rows), dtype=layout.row_dtype, device=device),
        sink_rows=sink_rows_of(
            torch.zeros((slots, layout.page_bytes), dtype=torch.uint8, device=device),
            layout,
            SINK_TOKENS,
        ),
    )


def _append(cache: PagedCache, layout: PageLayout, sample: Sample, use_kernels: bool) -> None:
    """Store all rows as one extend step of fresh sequences."""
    device = cache.pages.device
    lengths = torch.tensor(sample.lengths)
    zeros = torch.zeros_like(lengths)
    fields = {
        "pages": sample.pages,
        "slots": _slots(sample.is_last),
        "sink_pages": _slots(sample.is_first),
        "prior": zeros,
        "first": zeros,
        "end": lengths,
        "start": lengths.cumsum(0) - lengths,
        "is_first": torch.tensor(sample.is_first),
    }
    touched = TouchedPages(**{name: x.to(device, torch.int32) for name, x in fields.items()})
    if use_kernels:
        from sgl_kvq.kernels.append.api import append

        num_nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        no_rows = torch.zeros_like(cache.open_rows[:1])
        append(cache, layout, sample.k, sample.v, touched, num_nonfinite, no_rows)
        return
    from sgl_kvq.kernels.append.cpu import append_extend, plan_append_extend

    plan = plan_append_extend(touched, resumed_slots=sample.pages[:0])
    append_extend(cache, layout, sample.k, sample.v, plan)


def _keep_full_last_pages(cache: PagedCache, sample: Sample) -> None:
    """Write full last pages to their open slots, where they are read, as after a decode step."""
    slots = _slots(sample.is_last)
    start = 0
    for i, length in enumerate(sample.lengths):
        if sample.is_last[i] and length == PAGE_SIZE:
            rows = slice(start, start + PAGE_SIZE)
            cache.open_rows[int(slots[i])] = torch.stack([sample.k[rows], sample.v[rows]])
        start += length


def _expected_pages(layout: PageLayout, sample: Sample) -> torch.Tensor:
    """uint8 [full pages, page_bytes] by the specification, on the CPU."""
    k_pages, v_pages = (rows.cpu().split(sample.lengths) for rows in (sample.k, sample.v))
    full = [i for i, length in enumerate(sample.lengths) if length == PAGE_SIZE]
    sinks = torch.tensor([SINK_TOKENS * sample.is_first[i] for i in full], dtype=torch.int32)
    k, v = (torch.stack([pages[i] for i in full]) for pages in (k_pages, v_pages))
    return encode_pages(k, v, sinks, layout)


def _page_table(sample: Sample, device: str) -> PageTable:
    first, last = torch.tensor(sample.is_first), torch.tensor(sample.is_last)
    ends = last.nonzero().squeeze(1) + 1
    fields = {
        "kv_indptr": torch.cat([torch.zeros(1, dtype=torch.int64), ends]),
        "kv_indices": sample.pages,
        "kv_last_page_len": torch.tensor(sample.lengths)[last],
        "open_slots": _slots(sample.is_last)[last],
        "sink_pages": _slots(sample.is_first)[first],
    }
    return PageTable(**{name: value.to(device, torch.int32) for name, value in fields.items()})


def _decode(
    q: torch.Tensor, cache: PagedCache, table: PageTable, layout: PageLayout, use_kernels: bool
) -> torch.Tensor:
    sm_scale = layout.head_dim**-0.5
    if use_kernels:
        from sgl_kvq.kernels.decode.api import DecodeWorkspace, decode

        workspace = DecodeWorkspace(len(q), q.shape[1], layout, q.device)
        return decode(q, cache, table, layout, sm_scale, workspace)[0]
    from sgl_kvq.kernels.decode import cpu

    plan = cpu.plan_decode(table, cache.sink_tokens)
    return cpu.decode(q, cache, plan, layout, sm_scale)[0]


def _as_read(layout: PageLayout, sample: Sample, encoded: torch.Tensor) -> torch.Tensor:
    """K and V that a request reads: its last page exact, others dequantized, with exact sinks.

    Returns:
        float64 [2, tokens, num_kv_heads, head_dim], on the CPU.
    """
    seen = torch.stack([sample.k.cpu(), sample.v.cpu()]).double()
    decoded = torch.stack([decode(encoded, layout) for decode in (decode_keys, decode_values)])
    start = page = 0
    for length, is_first, is_last in zip(
        sample.lengths, sample.is_first, sample.is_last, strict=True
    ):
        if length == PAGE_SIZE:
            if not is_last:
                sinks = SINK_TOKENS * is_first
                rows = decoded[:, page].transpose(1, 2).double()
                seen[:, start + sinks : start + length] = rows[:, sinks:]
            page += 1
        start += length
    return seen


def _exact_attention(
    q: torch.Tensor, layout: PageLayout, sample: Sample, seen: torch.Tensor
) -> torch.Tensor:
    """float64 [batch, num_qo_heads, head_dim], on the CPU, over what each request must see."""
    out = []
    for row, (keys, values) in zip(
        q.double(), zip(*(part.split(SEQ_LENS) for part in seen), strict=True), strict=True
    ):
        grouped = row.view(layout.num_kv_heads, -1, layout.head_dim)
        scores = torch.einsum("hgd,thd->hgt", grouped, keys) / math.sqrt(layout.head_dim)
        out.append(torch.einsum("hgt,thd->hgd", scores.softmax(-1), values).reshape(row.shape))
    return torch.stack(out)
