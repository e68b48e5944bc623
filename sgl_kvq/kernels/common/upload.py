"""Bring host arrays to the device without waiting for it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch


def copy_from_host(target: torch.Tensor, values: npt.NDArray[np.int32]) -> None:
    """Copy an int32 array to a tensor of its shape.

    On a GPU the copy passes through page-locked memory that PyTorch keeps until it was made, so the
    array may change at once.
    """
    host = torch.from_numpy(values)
    if target.is_cuda:
        host = host.pin_memory()
    target.copy_(host, non_blocking=True)


def upload_columns(
    columns: dict[str, npt.NDArray[np.int32]], device: torch.device
) -> dict[str, torch.Tensor]:
    """Copy int32 arrays [n] to the device in one copy.

    Returns:
        By name, int32 views of one tensor.
    """
    values = np.concatenate(list(columns.values()))
    packed = torch.empty(len(values), dtype=torch.int32, device=device)
    copy_from_host(packed, values)
    sizes = [len(column) for column in columns.values()]
    return dict(zip(columns, packed.split(sizes), strict=True))
