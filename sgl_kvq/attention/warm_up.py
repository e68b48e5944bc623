"""Run every GPU kernel of an engine once, so that no request waits for a compiler."""

from __future__ import annotations

import logging
import time

import torch

from sgl_kvq.attention.engine import AttentionEngine
from sgl_kvq.attention.layer import LayerSpec
from sgl_kvq.attention.step import StepInput, StepMode
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.kernels.extend.configs import scratch_pages

logger = logging.getLogger(__name__)

PREFIX_LENS = (0, PAGE_SIZE, 2 * PAGE_SIZE + 1)
"""Cached tokens: none, a closed page, closed pages and an open one."""

FRESH_LEN = PAGE_SIZE + 1
"""Fresh tokens: they close a page and begin one."""


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
    scratch_len = scratch_pages(layout.num_kv_heads, layout.head_dim) * PAGE_SIZE
    for prefix_len in (*PREFIX_LENS, scratch_len):  # the last one takes two passes and a merge
        if prefix_len + FRESH_LEN <= context:
            _extend(engine, layers, prefix_len, device)
    for batch in {1, max_batch}:  # few requests are merged by another kernel than many
        _decode(engine, layers, batch, device)
    if torch.cuda.is_available():
        torch.cuda.synchronize(device)
    if torch.cuda.is_available():  # else interpreted
        torch.cuda.synchronize(device)
    logger.info("--kv-quant: attention kernels ready after %.1f s", time.perf_counter() - began)


def _extend(
    engine: AttentionEngine, layers: list[LayerSpec], prefix_len: int, device: torch.device | str
) -> None:
    step = StepInput(
        StepMode.EXTEND,
        torch.zeros(1, dtype=torch.int64, device=device),
        torch.tensor([prefix_len + FRESH_LEN], device=device),
        prefix_lens=[prefix_len],
        extend_lens=[FRESH_LEN],
    )
    engine.plan(step)
    for layer in {layer.layout: layer for layer in layers}.values():
        engine.extend(*_zeros(layer, FRESH_LEN, device), layer)


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
