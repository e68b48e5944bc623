"""What happens when SGLang resolves its arguments and `--kv-quant` is on.

First what the user gave is checked and SGLang's own choices are made for it (`prepare`), then
SGLang resolves (`run`), and what depends on the model is checked last (`validate`). All of it in
the launcher, before any process starts or weights are loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sgl_kvq.config import KVQuantConfig
from sgl_kvq.errors import ConfigError
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.calibration import Calibration
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.host.model_files import check_model_files
from sgl_kvq.host.names import BACKEND
from sgl_kvq.host.options import quant_config
from sgl_kvq.host.rank_basis import model_calibration
from sgl_kvq.host.server_options import check_options
from sgl_kvq.host.support import check_device, check_model, choose_graphs
from sgl_kvq.host.transfer_args import transfer_config
from sgl_kvq.host.versions.records import model_config_of, resolved_value
from sgl_kvq.host.versions.supported import check_version
from sgl_kvq.memory_pool.capacity import plan_pool


@dataclass(frozen=True)
class Resolved:
    """What the options mean for a model.

    Args:
        config: The options.
        layouts: Layout of a page row in each layer of the model, on one rank.
        calibration: Formats and bases of all layers, over all heads.
    """

    config: KVQuantConfig
    layouts: tuple[PageLayout, ...]
    calibration: Calibration


def prepare(args: Any) -> None:
    """Check what the user gave, and set the options of SGLang that follow from `--kv-quant`.

    Args:
        args: SGLang's `ServerArgs`, changed in place.

    Raises:
        ConfigError: names what does not fit.
    """
    check_version()
    check_device(args)
    check_options(args)
    quant_config(args)
    transfer_config(args)
    check_model_files(args.model_path)
    args.page_size = PAGE_SIZE
    args.attention_backend = BACKEND
    choose_graphs(args)


def run(original: Callable[[], None], args: Any) -> None:
    """Let SGLang resolve its arguments.

    Args:
        original: SGLang's resolution of `args`.
        args: SGLang's `ServerArgs`.

    Raises:
        ConfigError: SGLang cannot read the model folder.
    """
    try:
        original()
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"--model-path {args.model_path}: {reason}") from error


def validate(args: Any) -> Resolved | None:
    """Check that the model and the memory fit the options.

    Args:
        args: SGLang's `ServerArgs`, resolved.

    Returns:
        None for SGLang's placeholders of a model.

    Raises:
        ConfigError: names what does not fit and how much is needed.
    """
    config = quant_config(args)
    if config is None or args.model_path.lower() in ("none", "dummy"):
        return None
    model = model_config_of(args)
    check_model(model)
    resolved = Resolved(
        config,
        page_layouts(config, model, resolved_value(args, "tp_size"), model.dtype),
        model_calibration(config, model),
    )
    if config.memory_gb is not None:
        plan_pool(
            int(config.memory_gb * 2**30),
            resolved.layouts,
            config.sink_tokens,
            resolved_value(args, "max_running_requests"),
            resolved_value(args, "max_total_tokens"),
        )
    return resolved


def page_layouts(
    config: KVQuantConfig, model: Any, tp_size: int, model_dtype: torch.dtype
) -> tuple[PageLayout, ...]:
    """Layout of a page row in each layer of a model, on one rank.

    Args:
        config: The options.
        model: SGLang's `ModelConfig`.
        tp_size: Ranks that share the heads.
        model_dtype: Type of the model's activations; 32-bit models keep bfloat16 rows.
    """
    return tuple(
        PageLayout(
            format=layer_format,
            head_dim=model.head_dim,
            num_kv_heads=model.get_num_kv_heads(tp_size),
            row_dtype=model_dtype if model_dtype.itemsize == 2 else torch.bfloat16,
            hadamard_block=config.hadamard_block,
        )
        for layer_format in model_calibration(config, model).formats
    )
