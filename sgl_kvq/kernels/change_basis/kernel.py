"""Multiply heads by the matrix of their KV head, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from sgl_kvq.kernels.common.gluon import INTERPRET


@triton.jit
def _dot(a, b, total):
    """a b + total of 16-bit factors; the interpreter takes bfloat16 for integers."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total)


@triton.jit
def _multiply(
    x_ptr, stride_t, stride_h, matrix_ptr, out_ptr, block, head, tokens,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = x M for BLOCK_R rows (token, head of the group) of one KV head; out is contiguous.

    M is a sum of two 16-bit matrices, to 2^-17 of each element with bfloat16: a 256th of what
    rounding the result loses, for two products at twice the rate of TF32.
    """
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)
    token, member = row // GROUP, row % GROUP
    qo_head = head * GROUP + member
    valid = token < tokens
    token = token.to(tl.int64)
    source = x_ptr + token * stride_t + qo_head * stride_h
    target = out_ptr + (token * (KV_HEADS * GROUP) + qo_head) * HEAD_DIM
    matrix_ptr += head * HEAD_DIM * HEAD_DIM
    for n in tl.static_range(0, HEAD_DIM, BLOCK_N):
        out_channel = n + tl.arange(0, BLOCK_N)
        total = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
        for k in range(0, HEAD_DIM, BLOCK_K):
            channel = k + tl.arange(0, BLOCK_K)
            inside = channel < HEAD_DIM
            x_mask = valid[:, None] & inside[None, :]
            x = tl.load(source[:, None] + channel[None, :], mask=x_mask, other=0.0)
            ptrs = matrix_ptr + channel[:, None] * HEAD_DIM + out_channel[None, :]
            matrix_mask = inside[:, None] & (out_channel < HEAD_DIM)[None, :]
            matrix = tl.load(ptrs, mask=matrix_mask, other=0.0)
            high = matrix.to(x.dtype)
            low = (matrix - high.to(tl.float32)).to(x.dtype)
            total = _dot(x, high, _dot(x, low, total))
        out_mask = valid[:, None] & (out_channel < HEAD_DIM)[None, :]
        tl.store(target[:, None] + out_channel[None, :], total, mask=out_mask)


@triton.jit(do_not_specialize=("tokens",))
def _change_basis_kernel(
    x_ptr, stride_t, stride_h, matrix_ptr, out_ptr, tokens,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = x M of each KV head, for one tensor of heads."""
    _multiply(
        x_ptr, stride_t, stride_h, matrix_ptr, out_ptr, tl.program_id(0), tl.program_id(1), tokens,
        GROUP, KV_HEADS, HEAD_DIM, BLOCK_R, BLOCK_K, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=("tokens", "q_blocks", "kv_blocks"))
def _change_qkv_kernel(
    q_ptr, stride_qt, stride_qh, q_matrix_ptr, q_out_ptr,
    k_ptr, stride_kt, stride_kh, k_matrix_ptr, k_out_ptr,
    v_ptr, stride_vt, stride_vh, v_matrix_ptr, v_out_ptr, tokens, q_blocks, kv_blocks,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = x M for q, k and v: `q_blocks` programs for q, then `kv_blocks` each for k and v."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    if block < q_blocks:
        _multiply(
            q_ptr, stride_qt, stride_qh, q_matrix_ptr, q_out_ptr, block, head, tokens,
            GROUP, KV_HEADS, HEAD_DIM, BLOCK_R, BLOCK_K, BLOCK_N,
        )  # fmt: skip
    elif block < q_blocks + kv_blocks:
        _multiply(
            k_ptr, stride_kt, stride_kh, k_matrix_ptr, k_out_ptr, block - q_blocks, head, tokens,
            1, KV_HEADS, HEAD_DIM, BLOCK_R, BLOCK_K, BLOCK_N,
        )  # fmt: skip
    else:
        _multiply(
            v_ptr, stride_vt, stride_vh, v_matrix_ptr, v_out_ptr,
            block - q_blocks - kv_blocks, head, tokens,
            1, KV_HEADS, HEAD_DIM, BLOCK_R, BLOCK_K, BLOCK_N,
        )  # fmt: skip
