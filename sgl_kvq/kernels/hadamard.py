"""Block-diagonal Hadamard rotation of the channels of a head."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=32)
def hadamard_matrix(order: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the normalized Sylvester Hadamard matrix, symmetric and its own inverse.

    Args:
        order: A power of two.
        device: Where the matrix lives.
        dtype: Its type.

    Returns:
        [order, order].
    """
    matrix = torch.ones((1, 1), dtype=torch.float64)
    while matrix.shape[0] < order:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return (matrix / order**0.5).to(device=device, dtype=dtype)


def rotate(x: torch.Tensor, order: int) -> torch.Tensor:
    """Multiply each block of `order` channels by the Hadamard matrix. Its own inverse.

    Args:
        x: [..., head_dim], floating point; head_dim is a multiple of `order`.
        order: Order of the blocks.

    Returns:
        A new tensor like x.

    Source: SAW-INT4, block-diagonal rotation after RoPE; order 128 in the published runs.
    """
    blocks = x.unflatten(-1, (-1, order))
    return (blocks @ hadamard_matrix(order, x.device, x.dtype)).flatten(-2)
