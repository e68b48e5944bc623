"""Sizes of the extend operation."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from sgl_kvq.formats.base import PAGE_SIZE

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
