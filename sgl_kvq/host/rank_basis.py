"""Matrices of this rank's heads on its device, for formats with a basis of their own."""

from __future__ import annotations

from typing import Any

from sgl_kvq.attention.layer import HeadBasis
from sgl_kvq.config import KVQuantConfig
from sgl_kvq.formats.calibration import LayerBasis, default_basis, load_bases
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.registry import get_format
from sgl_kvq.host.names import get_parallel


def model_bases(config: KVQuantConfig, model_config: Any) -> list[LayerBasis]:
    """Bases of all layers and heads, none if the format stores heads as they are.

    Args:
        config: The options.
        model_config: SGLang's `ModelConfig`.

    Raises:
        ConfigError: `--kv-quant-config` does not fit the model.
    """
    if not get_format(config.format).own_basis:
        return []
    layers, head_dim = model_config.num_hidden_layers, model_config.head_dim
    num_kv_heads = model_config.get_total_num_kv_heads()
    if config.config_file is None:
        return [default_basis(head_dim, num_kv_heads)] * layers
    return load_bases(config.config_file, layers, num_kv_heads, head_dim)


def rank_bases(runner: Any, config: KVQuantConfig, layout: PageLayout) -> list[HeadBasis]:
    """Bases of this rank's layers, none if the format stores heads as they are.

    Args:
        runner: SGLang's `ModelRunner`.
        config: The options.
        layout: Of this rank's pages.

    Raises:
        ConfigError: `--kv-quant-config` does not fit the model.
    """
    device = str(runner.token_to_kv_pool.device)
    bases = model_bases(config, runner.model_config)
    parallel = get_parallel()
    total = runner.model_config.get_total_num_kv_heads()
    start = parallel.attn_tp_rank * total // parallel.attn_tp_size
    held = [basis.heads(start, start + layout.num_kv_heads) for basis in bases]
    return [
        HeadBasis(
            *(
                matrices.contiguous().to(device)
                for matrices in (basis.q, basis.k, basis.v, basis.out)
            )
        )
        for basis in held
    ]
