"""Sizes of the extend operation."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sgl_kvq.config import PAGE_SIZE
from sgl_kvq.kernels._page_spec import PageSpec
from sgl_kvq.kernels.extend.split import FusedLimits

# Bytes of 16-bit K and V that a pass over the cached prefix may take. One buffer serves all layers.
SCRATCH_BYTES = 128 << 20

# Head sizes that FlashInfer's prefill kernels exist for; others are padded to the next one.
PREFILL_HEAD_DIMS = (64, 128, 256)


def prefill_head_dim(head_dim: int) -> int:
    """Channels that a head takes in the scratch buffer."""
    return next(dim for dim in PREFILL_HEAD_DIMS if dim >= head_dim)


def scratch_pages(num_kv_heads: int, head_dim: int) -> int:
    """Pages of 16-bit K and V that fit in the scratch buffer."""
    return SCRATCH_BYTES // (4 * PAGE_SIZE * num_kv_heads * prefill_head_dim(head_dim))


FUSED_BLOCK_ROWS = 128  # packed query rows of a program of the fused kernel
_PROGRAMS_PER_SM = 2
_FUSED_MAX_TOKENS = 128
_FUSED_MIN_PAGES = 16


def fused_launch() -> dict[str, Any]:
    """Stages, warps and registers of the fused kernel."""
    return {"STAGES": 1, "num_warps": 4}


def fused_obstacle(spec: PageSpec) -> str | None:
    """Why pages are dequantized to the scratch buffer whatever the shape; None: not so."""
    dim = spec.head_dim
    reasons = (
        (spec.k.is_raw or spec.v.is_raw, "pages hold 16-bit rows, there is nothing to dequantize"),
        (dim & (dim - 1) != 0, f"{dim} channels are not a power of two, as tiles must be"),
        (dim > 128, f"rows of {dim} channels leave no registers for scores"),
        (spec.v.rotation > 1, "outputs would be in the basis of rotated values"),
    )
    return next((why for found, why in reasons if found), None)


def fused_limits(spec: PageSpec, gqa_group: int, device: torch.device) -> FusedLimits | None:
    """When the fused kernel is the faster way; None: never.

    Its tiles are made for Hopper: other GPUs have less shared memory and no product that runs
    beside other instructions.
    """
    if device.type != "cuda" or fused_obstacle(spec):
        return None
    major, num_sms = _device_facts(device)
    if major != 9:
        return None
    return FusedLimits(
        gqa_group=gqa_group,
        block_rows=FUSED_BLOCK_ROWS,
        num_programs=max(1, _PROGRAMS_PER_SM * num_sms // spec.num_kv_heads),
        max_rows=_FUSED_MAX_TOKENS * gqa_group,
        min_pages=_FUSED_MIN_PAGES,
    )


def prefill_backend(
    qo_indptr: npt.NDArray[np.int32], num_qo_heads: int, device: torch.device
) -> str:
    """Which of FlashInfer's kernels is faster for a pass.

    fa3, on Hopper, gives each query head a tile of 128 queries and does not split the keys: few
    queries leave most of the GPU idle. fa2 packs the heads of a group and splits the keys. Behind
    32,768 tokens on an H100, 32 query heads, without the fills: 64 fresh tokens 110 us with fa2 and
    363 with fa3, 512 fresh tokens 817 and 403; 256 take 406 with fa2.
    """
    major, num_sms = _device_facts(device)
    if major != 9:
        return "fa2"
    tiles = int(np.sum(-(-np.diff(qo_indptr) // 128))) * num_qo_heads
    return "fa2" if 4 * tiles <= num_sms else "fa3"


@cache
def _device_facts(device: torch.device) -> tuple[int, int]:
    """Major compute capability, multiprocessors."""
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.multi_processor_count
