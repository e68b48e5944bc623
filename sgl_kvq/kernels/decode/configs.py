"""Launch configuration of the decode kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from sgl_kvq.kernels._page_spec import PageSpec


@dataclass(frozen=True)
class DecodeConfig:
    """How the kernel is launched.

    Args:
        programs_per_sm: One-warp programs for each multiprocessor.
        max_registers: Upper limit of registers a thread, None for the compiler's choice.
        num_stages: Pages in shared memory, the one worked on and those that are on their way.
    """

    programs_per_sm: int
    max_registers: int | None = None
    num_stages: int = 2


def decode_config(spec: PageSpec, heads: int) -> DecodeConfig:
    """Configuration for a page and the padded query heads of a KV head (8 or 16)."""
    return DecodeConfig(programs_per_sm=8)


@lru_cache(maxsize=8)
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few for the interpreter."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
