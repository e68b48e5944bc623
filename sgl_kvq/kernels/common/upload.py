"""Bring host arrays to the device without waiting for it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch


def upload_columns(
    columns: dict[str, npt.NDArray[np.int32]], device: torch.device
) -> dict[str, torch.Tensor]:
    """Copy int32 arrays [n] to the device in one copy.

    Returns:
        By name, int32 views of one tensor.
    """
    host = torch.from_numpy(np.concatenate(list(columns.values())))
    if device.type == "cuda":
        host = host.pin_memory()
    sizes = [len(column) for column in columns.values()]
    return dict(zip(columns, host.to(device, non_blocking=True).split(sizes), strict=True))
