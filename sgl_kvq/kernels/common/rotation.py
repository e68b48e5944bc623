"""Hadamard rotation in Triton, bit for bit that of `formats/hadamard.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def rotate_tile(x, channel, ORDER: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Butterflies over the channels of [rows, positions] (float32); 1 / sqrt(ORDER) at the end.

    Position (c // WIDTH) * PADDED + c % WIDTH holds channel c. Launch without fused multiply-adds.
    """
    for bit in tl.static_range(0, 12):
        if (1 << bit) < ORDER:
            partner = channel ^ (1 << bit)
            # Padding positions stand for no channel; they stay inside the tile and are not used.
            position = ((partner // WIDTH) * PADDED + partner % WIDTH) % x.shape[1]
            index, _ = tl.broadcast(position[None, :], x)
            other = tl.gather(x, index, axis=1)
            x = tl.where((channel & (1 << bit))[None, :] != 0, other - x, x + other)
    return x * (1 / ORDER**0.5)


@triton.jit
def _rotate_fwd_kernel(
    x_ptr, stride_b, stride_h, out_ptr, num_rows, num_heads,
    HEAD_DIM: tl.constexpr, ORDER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = x H for rows [num_rows = batch * heads, HEAD_DIM]."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None] & (channel < HEAD_DIM)[None, :]
    source = (rows // num_heads).to(tl.int64) * stride_b + (rows % num_heads) * stride_h
    x = tl.load(x_ptr + source[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    x = rotate_tile(x, channel, ORDER, HEAD_DIM, BLOCK_D)
    target = rows.to(tl.int64)[:, None] * HEAD_DIM + channel[None, :]
    tl.store(out_ptr + target, x, mask=mask)


def rotate_rows(x: torch.Tensor, order: int) -> torch.Tensor:
    """Rotate queries into the basis of rotated keys.

    Args:
        x: [batch, heads, head_dim], 16 bits, channels contiguous.
        order: Order of the Hadamard blocks.

    Returns:
        float32 like x, contiguous.
    """
    batch, heads, head_dim = x.shape
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    block_rows = 4
    _rotate_fwd_kernel[(-(-batch * heads // block_rows),)](
        x, x.stride(0), x.stride(1), out, batch * heads, heads,
        HEAD_DIM=head_dim, ORDER=order, BLOCK_R=block_rows,
        BLOCK_D=1 << (head_dim - 1).bit_length(), num_warps=2, enable_fp_fusion=False,
    )  # fmt: skip
    return out
