"""Launch configuration of the decode kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.kernels.common.page_spec import PageSpec

ROWS_PER_UNIT = 16  # of the open page
_SWITCH_UNITS = 8  # cost of starting on another head, in units
_RESERVED_BYTES = 1024  # shared memory the driver keeps for each block


@dataclass(frozen=True)
class DecodeConfig:
    """How the kernel is launched.

    Args:
        num_programs: One-warp programs; all of them run at once.
        num_stages: Pages in shared memory: the one worked on and those being copied.
        use_pdl: Launch the merge early (programmatic dependent launch, compute capability 9).
    """

    num_programs: int
    num_stages: int
    use_pdl: bool


@dataclass(frozen=True)
class MergeConfig:
    """How partial results are merged.

    Args:
        block_slots: Partial results read at a time.
        num_warps: Warps of a program.
    """

    block_slots: int
    num_warps: int


def merge_config(num_programs: int, num_heads: int) -> MergeConfig:
    """Configuration for a batch of `num_heads` (request, KV head) pairs.

    Few partial results for each of many heads: one warp, so that all programs wait beside the
    decode kernel and read everything at once. Many for few heads: wider blocks, as wide as still
    fits there (64 slots in 8 warps lost 2 us at 8 x 1024, H100, 2026-11-24).
    """
    if num_programs < 6 * num_heads:
        return MergeConfig(block_slots=8, num_warps=1)
    return MergeConfig(block_slots=32, num_warps=4)


def tail_units(sink_tokens: int) -> int:
    """Units of work of a request and head besides its closed pages; see `kernel.py`."""
    return PAGE_SIZE // ROWS_PER_UNIT + (1 if sink_tokens else 0) + _SWITCH_UNITS


def decode_config(spec: PageSpec, device: torch.device) -> DecodeConfig:
    """Configuration for a page.

    Two warps a scheduler with up to 248 registers each beat three with 168 and four with 128 for
    every format and shape; a third stage gains nothing (H100, 2026-11-22, `docs/performance.md`).
    All programs run at once: a multiple of four for each multiprocessor, which has four schedulers.
    """
    num_stages = 2
    if device.type != "cuda":
        return DecodeConfig(num_programs=4, num_stages=num_stages, use_pdl=False)
    properties = torch.cuda.get_device_properties(device)
    shared_bytes = num_stages * spec.head_bytes + _RESERVED_BYTES
    fitting = min(8, int(properties.shared_memory_per_multiprocessor // shared_bytes))
    if fitting > 4:
        fitting = fitting // 4 * 4
    return DecodeConfig(
        num_programs=properties.multi_processor_count * max(1, fitting),
        num_stages=num_stages,
        use_pdl=properties.major >= 9,
    )
