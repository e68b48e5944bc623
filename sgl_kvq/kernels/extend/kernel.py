"""Extend attention in Triton: fill the scratch buffer with rows and pages, merge results."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from sgl_kvq.formats.quantize import LARGEST_MAGNITUDE
from sgl_kvq.kernels.common.layouts import PAGE, next_power_of_2
from sgl_kvq.kernels.extend.pages import page_rows, tile_channels

LARGEST: tl.constexpr = tl.constexpr(LARGEST_MAGNITUDE)
# Arguments whose address must not make Triton compile another variant.
FILLS = ("page_ptr", "sink_page_ptr", "target_ptr", "num_pages_ptr")
COPIES = ("touched_ptr", "target_ptr")
TOUCHED = ("prior_ptr", "first_ptr", "end_ptr", "start_ptr")


class TouchedPage(NamedTuple):
    """A page that this step writes to: rows `first` to `end - 1` are fresh, earlier ones prior.

    Args:
        first: First fresh row.
        end: Row behind the last one.
        start: Fresh token of row `first`.
        prior: Index among the resumed pages; read only if `first` is positive.
    """

    first: Any
    end: Any
    start: Any
    prior: Any


@triton.jit
def _row_ptrs(out_ptr, target, head, channel, OUT_DIM: tl.constexpr, SPEC: tl.constexpr):
    """Addresses [64, channels] of a page's rows in the scratch buffer."""
    rows = tl.arange(0, PAGE).to(tl.int64)[:, None]
    ptrs = out_ptr + (target.to(tl.int64) + rows) * (SPEC.num_kv_heads * OUT_DIM)
    return ptrs + head * OUT_DIM + channel[None, :]


@triton.jit
def _copy_page(
    page, fresh_ptr, stride_t, stride_h, prior_rows_ptr, out_ptr, target, head,
    OUT_DIM: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Copy the rows of a touched page; `prior_rows_ptr` is where K or V of prior rows begin."""
    D: tl.constexpr = SPEC.head_dim
    ROW: tl.constexpr = SPEC.num_kv_heads * D
    channel = tl.arange(0, next_power_of_2(D))
    valid = (channel < D)[None, :]
    tokens = tl.arange(0, PAGE)[:, None]
    rows = tokens.to(tl.int64)
    is_fresh = (tokens >= page.first) & (tokens < page.end) & valid
    ptrs = fresh_ptr + (page.start.to(tl.int64) - page.first + rows) * stride_t
    x = tl.load(ptrs + head * stride_h + channel[None, :], mask=is_fresh, other=0.0)
    if page.first > 0:
        is_prior = (tokens < page.first) & valid
        ptrs = prior_rows_ptr + page.prior.to(tl.int64) * (2 * PAGE * ROW) + rows * ROW
        prior = tl.load(ptrs + head * D + channel[None, :], mask=is_prior, other=0.0)
        x = tl.where(is_prior, prior, x)
    # Attention multiplies masked rows of other sequences by zero: they must be finite.
    wide = x.to(tl.float32)
    x = tl.where(wide == wide, tl.minimum(tl.maximum(wide, -LARGEST), LARGEST), 0.0)
    ptrs = _row_ptrs(out_ptr, target, head, channel, OUT_DIM, SPEC)
    tl.store(ptrs, x.to(out_ptr.dtype.element_ty), mask=(tokens < page.end) & valid)


@triton.jit(do_not_specialize_on_alignment=(*COPIES, *TOUCHED))
def _copy_rows_kernel(
    k_ptr, v_ptr, stride_kt, stride_kh, stride_vt, stride_vh, touched_ptr, target_ptr,
    prior_ptr, first_ptr, end_ptr, start_ptr, prior_rows_ptr, k_out_ptr, v_out_ptr,
    OUT_DIM: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Scratch rows [tokens, KV heads, OUT_DIM] = 16-bit rows of touched pages; -1 is padding."""
    head = tl.program_id(1)
    touched = tl.load(touched_ptr + tl.program_id(0))
    if touched >= 0:
        target = tl.load(target_ptr + tl.program_id(0))
        page = TouchedPage(
            tl.load(first_ptr + touched), tl.load(end_ptr + touched),
            tl.load(start_ptr + touched), tl.load(prior_ptr + touched),
        )  # fmt: skip
        if tl.program_id(2) == 0:
            _copy_page(
                page, k_ptr, stride_kt, stride_kh, prior_rows_ptr, k_out_ptr, target, head,
                OUT_DIM, SPEC,
            )  # fmt: skip
        else:
            v_rows_ptr = prior_rows_ptr + PAGE * SPEC.num_kv_heads * SPEC.head_dim
            _copy_page(
                page, v_ptr, stride_vt, stride_vh, v_rows_ptr, v_out_ptr, target, head,
                OUT_DIM, SPEC,
            )  # fmt: skip


@triton.jit
def _dequantize_page(
    head_ptr, sink_page, sink_rows_ptr, out_ptr, target, head, IS_KEY: tl.constexpr,
    SINKS: tl.constexpr, OUT_DIM: tl.constexpr, CODING: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Write a closed page; `sink_rows_ptr` is where K or V of sink rows begin."""
    ROW: tl.constexpr = SPEC.num_kv_heads * SPEC.head_dim
    channel, valid = tile_channels(CODING, SPEC)
    x = page_rows(head_ptr, IS_KEY, CODING, SPEC, out_ptr.dtype.element_ty)
    if SINKS > 0 and sink_page > 0:
        tokens = tl.arange(0, PAGE)[:, None]
        is_sink = (tokens < SINKS) & valid[None, :]
        ptrs = sink_rows_ptr + sink_page.to(tl.int64) * (SPEC.page_bytes // 2)
        ptrs = ptrs + tokens.to(tl.int64) * ROW + head * SPEC.head_dim + channel[None, :]
        x = tl.where(is_sink, tl.load(ptrs, mask=is_sink, other=0.0), x)
    ptrs = _row_ptrs(out_ptr, target, head, channel, OUT_DIM, SPEC)
    tl.store(ptrs, x, mask=valid[None, :])


@triton.jit(do_not_specialize_on_alignment=FILLS)
def _dequantize_pages_kernel(
    page_ptr, sink_page_ptr, target_ptr, num_pages_ptr,
    pages_ptr, sink_rows_ptr, k_out_ptr, v_out_ptr,
    SINKS: tl.constexpr, OUT_DIM: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Scratch rows [tokens, KV heads, OUT_DIM] = code * scale + min; sink rows are copied.

    Programs share out the pages, so that a launch fits any number of them.
    """
    head = tl.program_id(1)
    K: tl.constexpr = SPEC.k
    V: tl.constexpr = SPEC.v
    for entry in range(tl.program_id(0), tl.load(num_pages_ptr), tl.num_programs(0)):
        target = tl.load(target_ptr + entry)
        page = tl.load(page_ptr + entry).to(tl.int64)
        head_ptr = pages_ptr + page * SPEC.page_bytes + head * SPEC.head_bytes
        sink_page = tl.load(sink_page_ptr + entry)
        if tl.program_id(2) == 0:
            _dequantize_page(
                head_ptr, sink_page, sink_rows_ptr, k_out_ptr, target, head, True,
                SINKS, OUT_DIM, K, SPEC,
            )  # fmt: skip
        else:
            v_rows_ptr = sink_rows_ptr + SINKS * SPEC.num_kv_heads * SPEC.head_dim
            _dequantize_page(
                head_ptr, sink_page, v_rows_ptr, v_out_ptr, target, head, False,
                SINKS, OUT_DIM, V, SPEC,
            )  # fmt: skip


@triton.jit
def _merge_fwd_kernel(out_ptr, lse_ptr, other_ptr, other_lse_ptr, HEAD_DIM: tl.constexpr):
    """(out, lse) of a token and head = both results, weighted by 2^lse."""
    row = tl.program_id(0).to(tl.int64)
    at = row * HEAD_DIM + tl.arange(0, HEAD_DIM)
    lse, other_lse = tl.load(lse_ptr + row), tl.load(other_lse_ptr + row)
    largest = tl.maximum(lse, other_lse)
    largest = tl.where(largest == float("-inf"), 0.0, largest)  # neither saw a key
    weight, other_weight = tl.exp2(lse - largest), tl.exp2(other_lse - largest)
    total = weight + other_weight
    scale = 1.0 / tl.where(total > 0.0, total, 1.0)
    out = tl.load(out_ptr + at).to(tl.float32) * (weight * scale)
    out += tl.load(other_ptr + at).to(tl.float32) * (other_weight * scale)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty))
    tl.store(lse_ptr + row, largest + tl.log2(total))
