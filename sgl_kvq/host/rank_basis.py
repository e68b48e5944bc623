"""Matrices of this rank's heads on its device, for formats with a basis of their own."""

from __future__ import annotations

from typing import Any

from sgl_kvq.attention.layer import HeadBasis
from sgl_kvq.config import KVQuantConfig
from sgl_kvq.formats.calibration import Calibration, load_calibration
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.host.names import get_parallel


def model_calibration(config: KVQuantConfig, model_config: Any) -> Calibration:
    """Formats and bases of all layers of a model.

    Args:
        config: The options.
        model_config: SGLang's `ModelConfig`.

    Raises:
        ConfigError: `--kv-quant-config` does not fit the model.
    """
    return load_calibration(
        config.format,
        config.config_file,
        model_config.num_hidden_layers,
        model_config.get_total_num_kv_heads(),
        model_config.head_dim,
    )


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
    bases = model_calibration(config, runner.model_config).bases
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
