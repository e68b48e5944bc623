"""Small model folders with random weights: architectures that SGLang serves, not languages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    # Five times the usual spread: otherwise attention is uniform and no KV error shows.
    "initializer_range": 0.1,
}

# Name: (configuration class, what sets the family apart from a Llama with two KV heads).
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama-mha": (LlamaConfig, {"num_key_value_heads": 4}),
    "qwen2": (Qwen2Config, {}),  # biases on Q, K and V
    "qwen3": (Qwen3Config, {"head_dim": 128}),  # norms on Q and K
    "qwen3-moe": (  # asks the backend for its pool; all experts, since rounding changes the choice
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 256},
    ),
    "mistral": (MistralConfig, {"sliding_window": None}),
}


def make_model(
    folder: Path, tokenizer_path: str, family: str, dtype: torch.dtype, **changes: Any
) -> PreTrainedModel:
    """Write a model folder and return its model, for changes to its weights and `save_pretrained`.

    Args:
        folder: Created.
        tokenizer_path: Folder whose tokenizer the model gets.
        family: A key of `FAMILIES`.
        dtype: Of the weights.
        changes: Fields of the configuration.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    config_class, special = FAMILIES[family]
    common = {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "dtype": dtype}
    common["eos_token_id"] = tokenizer.eos_token_id  # grammars need one
    config = config_class(**{**SIZES, **common, **special, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, weight in model.named_parameters():
        # Biases start at 0 and norms at 1, which would hide a path that drops them.
        if name.endswith((".bias", "q_norm.weight", "k_norm.weight")):
            weight.data += 0.5 * torch.randn_like(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
