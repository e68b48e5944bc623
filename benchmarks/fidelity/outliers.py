"""Give a model's keys channel outliers without changing what it computes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from sgl_kvq.fidelity.geometry import model_geometry

PAIRS_PER_HEAD = 2
FACTOR = 8.0  # a power of two: scaling bfloat16 weights by it loses nothing


def inject(model_path: Path, folder: Path) -> None:
    """Write a copy of a model with outliers in K, as Qwen's and Llama's keys have them.

    In each KV head some channel pairs of K grow by `FACTOR` and those of its queries shrink by it.
    RoPE turns a pair as one, so scores stay exactly the same.

    Args:
        model_path: Hugging Face folder of a Llama-type model.
        folder: Where the copy goes.
    """
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
    shape = model_geometry(model.config)
    head_dim, num_kv_heads = shape.head_dim, shape.num_kv_heads
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.base_model.layers:
            factors = torch.ones(num_kv_heads, head_dim)
            for head in factors:
                pairs = torch.randperm(head_dim // 2, generator=generator)[:PAIRS_PER_HEAD]
                head[pairs] = head[pairs + head_dim // 2] = FACTOR
            group = shape.num_qo_heads // num_kv_heads
            _scale(layer.self_attn.k_proj, factors.flatten())
            _scale(layer.self_attn.q_proj, 1 / factors.repeat_interleave(group, 0).flatten())
    model.save_pretrained(folder)
    for path in model_path.iterdir():
        if not (folder / path.name).exists() and path.is_file():
            shutil.copy(path, folder)


def _scale(projection: Any, factors: torch.Tensor) -> None:
    projection.weight.mul_(factors[:, None].to(projection.weight.dtype))
    if projection.bias is not None:
        projection.bias.mul_(factors.to(projection.bias.dtype))
