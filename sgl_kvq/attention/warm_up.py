"""Run every GPU kernel of an engine once, so that no request waits for a compiler."""

from __future__ import annotations

import logging
import time

import torch

from sgl_kvq.attention.engine import AttentionEngine
from sgl_kvq.attention.layer import LayerSpec
from sgl_kvq.attention.step import StepInput, StepMode
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.kernels.change_basis.api import SMALL_BATCH
from sgl_kvq.kernels.extend.configs import scratch_pages

logger = logging.getLogger(__name__)

FRESH_LEN = PAGE_SIZE + 1
"""Fresh tokens: they close a page and begin one."""

LENS = (
    (0, FRESH_LEN),
    (PAGE_SIZE, FRESH_LEN),
    (2 * PAGE_SIZE + 1, FRESH_LEN),
    (0, SMALL_BATCH + 1),
)
"""Cached and fresh tokens: no page, a closed page, an open one; more than a small batch."""


@torch.no_grad()
def warm_up(
    engine: AttentionEngine,
    layers: list[LayerSpec],
    max_batch: int,
    context: int,
    device: torch.device | str,
) -> None:
    """Extend and decode requests whose tokens all lie in the padding page.

    Call it before the first request: the token table is still zero, and token 0 is nobody's.

    Args:
        engine: To warm up.
        layers: Its attention layers.
        max_batch: Requests that may run at once.
        context: Tokens that a row of the token table holds.
        device: A GPU.
    """
    began = time.perf_counter()
    layout = layers[0].layout
    scratch_len = scratch_pages(layout.num_kv_heads, layout.head_dim, device) * PAGE_SIZE
    for prefix_len, fresh_len in (*LENS, (scratch_len, FRESH_LEN)):  # the last one takes a merge
        if prefix_len + fresh_len <= context:
            _extend(engine, layers, prefix_len, fresh_len, device)
    for batch in {1, max_batch}:  # few requests are merged by another kernel than many
        _decode(engine, layers, batch, device)
    if torch.cuda.is_available():  # else interpreted
        torch.cuda.synchronize(device)
    logger.info("--kv-quant: attention kernels ready after %.1f s", time.perf_counter() - began)


def _extend(
    engine: AttentionEngine,
    layers: list[LayerSpec],
    prefix_len: int,
    fresh_len: int,
    device: torch.device | str,
) -> None:
    step = StepInput(
        StepMode.EXTEND,
        torch.zeros(1, dtype=torch.int64, device=device),
        torch.tensor([prefix_len + fresh_len], device=device),
        prefix_lens=[prefix_len],
        extend_lens=[fresh_len],
    )
    engine.plan(step)
    for layer in {layer.layout: layer for layer in layers}.values():
        engine.extend(*_zeros(layer, fresh_len, device), layer)


def _decode(
    engine: AttentionEngine, layers: list[LayerSpec], batch: int, device: torch.device | str
) -> None:
    rows = torch.zeros(batch, dtype=torch.int64, device=device)
    engine.plan(StepInput(StepMode.DECODE, rows, rows + 1))
    for layer in layers:
        engine.decode(*_zeros(layer, batch, device), layer)


def _zeros(
    layer: LayerSpec, num_tokens: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v [tokens, heads, head_dim], views of one tensor as a model's projection gives."""
    layout = layer.layout
    heads = (layer.num_qo_heads, layout.num_kv_heads, layout.num_kv_heads)
    shape = (num_tokens, sum(heads), layout.head_dim)
    q, k, v = torch.zeros(shape, dtype=layout.row_dtype, device=device).split(heads, dim=1)
    return q, k, v
