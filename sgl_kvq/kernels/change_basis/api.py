"""Change of basis on a GPU: the operations that callers use.

`change_basis` of `formats/calibration.py` is the specification.
"""

from __future__ import annotations

import torch

from sgl_kvq.kernels.change_basis.kernel import _change_basis_kernel, _change_qkv_kernel

SMALL_BATCH = 512  # rows of a KV head up to which small blocks fill the GPU better


def _blocks(num_rows: int, head_dim: int) -> dict[str, int]:
    """Block sizes: rows, channels in, channels out."""
    return {
        "BLOCK_R": 16 if num_rows <= SMALL_BATCH else 64,
        "BLOCK_K": 32,
        "BLOCK_N": min(128, 1 << (head_dim - 1).bit_length()),
    }


def change_basis(
    x: torch.Tensor, matrices: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply each head by the matrix of its KV head; products in three TF32 parts.

    Args:
        x: [tokens, heads, head_dim], channels contiguous; query heads of a KV head are adjacent.
        matrices: float32 [num_kv_heads, head_dim, head_dim], contiguous.
        out: Like x, contiguous, written; None: a new one.

    Returns:
        out.
    """
    tokens, heads, head_dim = x.shape
    num_kv_heads = len(matrices)
    group = heads // num_kv_heads
    blocks = _blocks(tokens * group, head_dim)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _change_basis_kernel[(-(-tokens * group // blocks["BLOCK_R"]), num_kv_heads)](
        x, x.stride(0), x.stride(1), matrices, out, tokens,
        GROUP=group, KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, **blocks, num_warps=4,
    )  # fmt: skip
    return out


def change_qkv(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    matrices: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Change the basis of q, k and v in one launch.

    Args:
        qkv: As `x` of `change_basis`.
        matrices: For q, k and v.

    Returns:
        New contiguous tensors like q, k and v.
    """
    q, k, _ = qkv
    tokens, heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = heads // num_kv_heads
    blocks = _blocks(tokens * group, head_dim)
    q_blocks, kv_blocks = (-(-tokens * size // blocks["BLOCK_R"]) for size in (group, 1))
    outs = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in qkv)
    arguments = [
        argument
        for x, matrix, out in zip(qkv, matrices, outs, strict=True)
        for argument in (x, x.stride(0), x.stride(1), matrix, out)
    ]
    _change_qkv_kernel[(q_blocks + 2 * kv_blocks, num_kv_heads)](
        *arguments, tokens, q_blocks, kv_blocks,
        GROUP=group, KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, **blocks, num_warps=4,
    )  # fmt: skip
    q_out, k_out, v_out = outs
    return q_out, k_out, v_out
