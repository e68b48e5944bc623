"""The shape of a model's KV cache, from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sgl_kvq.errors import ConfigError


@dataclass(frozen=True)
class ModelGeometry:
    """What a KV cache has to hold.

    Args:
        num_layers: Layers with attention.
        num_qo_heads: Query heads of a layer.
        num_kv_heads: KV heads of a layer.
        head_dim: Channels of a head.
    """

    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int


def model_geometry(config: Any) -> ModelGeometry:
    """Read the geometry of a model of text, or of the text part of one.

    Args:
        config: `PretrainedConfig` of transformers. Many classes leave out `head_dim` (Qwen2, Phi-3)
            or `num_key_value_heads`, which then follow from the number of query heads.

    Raises:
        ConfigError: it does not describe attention heads.
    """
    text = config.get_text_config()
    try:
        num_qo_heads = int(text.num_attention_heads)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // num_qo_heads
        num_kv_heads = getattr(text, "num_key_value_heads", None) or num_qo_heads
        return ModelGeometry(int(text.num_hidden_layers), num_qo_heads, num_kv_heads, int(head_dim))
    except AttributeError as error:
        raise ConfigError(
            f"expected a model with layers of attention heads, {type(config).__name__}: {error}"
        ) from error
