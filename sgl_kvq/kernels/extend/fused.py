"""Attention of few fresh tokens to the closed pages before them, in Triton.

Query rows of one KV head are packed, token by token and head by head, into blocks of BLOCK_M rows.
Codes become 16-bit numbers in registers (`pages.py`) and go to shared memory for the tensor cores,
never to global memory. An item is a block and a range of its pages, so that long prefixes fill the
GPU; its program leaves a normalized partial result and its log-sum-exp in base 2.
`_merge_fwd_kernel` adds them up, together with the result over the pages the step touches.

Place n of a tile's channels is plane n % planes of byte n // planes: the order in which registers
hold them. Queries are read and outputs are written accordingly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sgl_kvq.kernels._gluon import INTERPRET
from sgl_kvq.kernels._layouts import PAGE, num_planes, plane_width
from sgl_kvq.kernels.extend.pages import narrow, page_planes

ITEM_COLUMNS: tl.constexpr = tl.constexpr(5)
BLOCK_COLUMNS: tl.constexpr = tl.constexpr(5)
SINK_TILE: tl.constexpr = tl.constexpr(16)
# Arguments whose address must not make Triton compile another variant.
TABLES = ("page_ptr", "sink_slot_ptr", "item_ptr")


@triton.jit
def _channel_of(D: tl.constexpr, CODING: tl.constexpr, SPEC: tl.constexpr):
    """Channel of each place."""
    n = tl.arange(0, D)
    return (n % num_planes(CODING)) * plane_width(SPEC, CODING) + n // num_planes(CODING)


@triton.jit
def _dot(a, b, acc):
    if INTERPRET:  # it multiplies the bits of bfloat16 as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def _load_q(q_ptr, stride_t, stride_h, tokens, heads, valid, channel, DTYPE: tl.constexpr):
    ptrs = q_ptr + tokens * stride_t + heads * stride_h
    q = tl.load(ptrs[:, None] + channel[None, :], mask=valid[:, None], other=0.0)
    return narrow(q.to(tl.float32), DTYPE)


@triton.jit
def _load_page(head_ptr, SPEC: tl.constexpr, DTYPE: tl.constexpr):
    """Keys [64, D] and values [D, 64] of one head of a closed page."""
    D: tl.constexpr = SPEC.head_dim
    K: tl.constexpr = SPEC.k
    V: tl.constexpr = SPEC.v
    k = page_planes(head_ptr, True, K, SPEC, DTYPE)
    v = page_planes(head_ptr, False, V, SPEC, DTYPE)
    return tl.reshape(k, [PAGE, D]), tl.reshape(tl.permute(v, [0, 2, 1]), [D, PAGE])


@triton.jit
def _attend(scores, v, m_run, l_run, acc, sm_scale_log2):
    """Online softmax: add keys with scores [BLOCK_M, n] and values [D, n]."""
    m_new = tl.maximum(m_run, tl.max(scores, axis=1) * sm_scale_log2)
    p = tl.exp2(scores * sm_scale_log2 - m_new[:, None])
    alpha = tl.exp2(m_run - m_new)
    l_run = l_run * alpha + tl.sum(p, axis=1)
    acc = _dot(narrow(p, v.dtype), tl.trans(v), acc * alpha[:, None])
    return m_new, l_run, acc


@triton.jit
def _attend_sinks(
    q, sink_ptr, m_run, l_run, acc, sm_scale_log2,
    channel_k, SINKS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Add the 16-bit rows [2, SINKS, KV heads, D] of the first tokens."""
    D: tl.constexpr = SPEC.head_dim
    V: tl.constexpr = SPEC.v
    ROW: tl.constexpr = SPEC.num_kv_heads * D
    tokens = tl.arange(0, SINK_TILE)
    is_sink = tokens < SINKS
    ptrs = sink_ptr + tokens[:, None] * ROW + channel_k[None, :]
    k = tl.load(ptrs, mask=is_sink[:, None], other=0.0)
    channel_v = _channel_of(D, V, SPEC)
    ptrs = sink_ptr + SINKS * ROW + tokens[None, :] * ROW + channel_v[:, None]
    v = tl.load(ptrs, mask=is_sink[None, :], other=0.0)
    scores = _dot(q, tl.trans(k), tl.full([q.shape[0], SINK_TILE], 0.0, tl.float32))
    scores = tl.where(is_sink[None, :], scores, float("-inf"))
    return _attend(scores, v, m_run, l_run, acc, sm_scale_log2)


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _fused_fwd_kernel(
    q_ptr, q_codes_ptr, stride_t, stride_h, stride_ct, stride_ch, pages_ptr, sink_rows_ptr,
    page_ptr, sink_slot_ptr, item_ptr, out_ptr, lse_ptr, sm_scale_log2,
    GQA: tl.constexpr, SINKS: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
    SPEC: tl.constexpr,
):  # fmt: skip
    """softmax(q K^T) V over the pages of one item: out [BLOCK_M, D], lse [BLOCK_M]."""
    D: tl.constexpr = SPEC.head_dim
    K: tl.constexpr = SPEC.k
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    item = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    item_ptr += item * ITEM_COLUMNS
    first_token = tl.load(item_ptr).to(tl.int64)
    first_row = tl.load(item_ptr + 1)
    num_rows = tl.load(item_ptr + 2)
    begin = tl.load(item_ptr + 3)
    end = tl.load(item_ptr + 4)
    rows = first_row + tl.arange(0, BLOCK_M)
    tokens = first_token + rows // GQA
    heads = head * GQA + rows % GQA
    valid = rows < num_rows
    channel = _channel_of(D, K, SPEC)
    q = _load_q(q_codes_ptr, stride_ct, stride_ch, tokens, heads, valid, channel, DTYPE)
    m_run = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_run = tl.full([BLOCK_M], 0.0, tl.float32)
    acc = tl.full([BLOCK_M, D], 0.0, tl.float32)
    zeros = tl.full([BLOCK_M, PAGE], 0.0, tl.float32)
    base_ptr = pages_ptr + head * SPEC.head_bytes
    if SINKS > 0:
        sink_slot = tl.load(sink_slot_ptr + begin).to(tl.int64)
        if sink_slot > 0:
            page = tl.load(page_ptr + begin).to(tl.int64)
            k, v = _load_page(base_ptr + page * SPEC.page_bytes, SPEC, DTYPE)
            scores = _dot(q, tl.trans(k), zeros)
            is_code = tl.arange(0, PAGE) >= SINKS
            scores = tl.where(is_code[None, :], scores, float("-inf"))
            m_run, l_run, acc = _attend(scores, v, m_run, l_run, acc, sm_scale_log2)
            q_rows = q
            if SPEC.k.rotation > 1:
                q_rows = _load_q(q_ptr, stride_t, stride_h, tokens, heads, valid, channel, DTYPE)
            sink_ptr = sink_rows_ptr + sink_slot * (2 * SINKS * SPEC.num_kv_heads * D) + head * D
            m_run, l_run, acc = _attend_sinks(
                q_rows, sink_ptr, m_run, l_run, acc, sm_scale_log2, channel, SINKS, SPEC
            )
            begin += 1
    for index in tl.range(begin, end, num_stages=STAGES):
        page = tl.load(page_ptr + index).to(tl.int64)
        k, v = _load_page(base_ptr + page * SPEC.page_bytes, SPEC, DTYPE)
        scores = _dot(q, tl.trans(k), zeros)
        m_run, l_run, acc = _attend(scores, v, m_run, l_run, acc, sm_scale_log2)
    place = (item * SPEC.num_kv_heads + head) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + place, m_run + tl.log2(l_run))
    tl.store(out_ptr + place[:, None] * D + tl.arange(0, D)[None, :], acc / l_run[:, None])


@triton.jit(do_not_specialize=("num_heads",), do_not_specialize_on_alignment=("block_ptr",))
def _merge_fwd_kernel(
    part_ptr, part_lse_ptr, block_ptr, out_ptr, lse_ptr, stride_t, stride_h, num_heads,
    GQA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Add the partial results of BLOCK_R rows of a block to (out, lse), which hold another one."""
    D: tl.constexpr = SPEC.head_dim
    V: tl.constexpr = SPEC.v
    head = tl.program_id(1)
    block_ptr += tl.program_id(0) * BLOCK_COLUMNS
    first_token = tl.load(block_ptr).to(tl.int64)
    first_row = tl.load(block_ptr + 1)
    num_rows = tl.load(block_ptr + 2)
    first_item = tl.load(block_ptr + 3)
    end_item = tl.load(block_ptr + 4)
    in_block = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = first_row + in_block
    valid = rows < num_rows
    tokens = first_token + rows // GQA
    heads = head * GQA + rows % GQA
    channel = _channel_of(D, V, SPEC)
    lse_ptrs = lse_ptr + tokens * num_heads + heads
    out_ptrs = out_ptr + tokens[:, None] * stride_t + heads[:, None] * stride_h + channel[None, :]
    m_run = tl.load(lse_ptrs, mask=valid, other=0.0)
    total = tl.full([BLOCK_R], 1.0, tl.float32)
    acc = tl.load(out_ptrs, mask=valid[:, None], other=0.0).to(tl.float32)
    place = (first_item.to(tl.int64) * SPEC.num_kv_heads + head) * BLOCK_M + in_block
    for _ in range(first_item, end_item):
        lse = tl.load(part_lse_ptr + place)
        part = tl.load(part_ptr + place[:, None] * D + tl.arange(0, D)[None, :])
        m_new = tl.maximum(m_run, lse)
        alpha = tl.exp2(m_run - m_new)
        beta = tl.exp2(lse - m_new)
        total = total * alpha + beta
        acc = acc * alpha[:, None] + part * beta[:, None]
        m_run = m_new
        place += SPEC.num_kv_heads * BLOCK_M
    tl.store(lse_ptrs, m_run + tl.log2(total), mask=valid)
    out = narrow(acc / total[:, None], out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=valid[:, None])
