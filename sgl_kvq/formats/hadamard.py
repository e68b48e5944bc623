"""Block-diagonal Hadamard rotation of the channels of a head."""

from __future__ import annotations

import torch


def rotate(x: torch.Tensor, order: int) -> torch.Tensor:
    """Multiply each block of `order` channels by the normalized Sylvester Hadamard matrix.

    The rotation is its own inverse. It is computed by butterflies, additions and subtractions in a
    fixed order, so that every device and batch shape gives the same bits.

    Args:
        x: [..., head_dim], float32 or float64; head_dim is a multiple of `order`.
        order: Order of the blocks, a power of two.

    Returns:
        A new tensor like x.

    Source: SAW-INT4, block-diagonal rotation after RoPE; order 128 in the published runs.
    """
    shape, width = x.shape, 1
    while width < order:
        a, b = x.reshape(*shape[:-1], shape[-1] // (2 * width), 2, width).unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2)
        width *= 2
    return x.reshape(shape) * (1 / order**0.5)
