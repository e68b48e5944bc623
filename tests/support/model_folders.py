"""Small model folders with random weights: architectures that SGLang serves, not languages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

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
# Every expert is chosen for every token: rounding would change the choice.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 4}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 4}
EXPERT_SIZE = {"moe_intermediate_size": 256}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-mha": ("LlamaConfig", {"num_key_value_heads": 4}),
    "arcee": ("ArceeConfig", {}),
    "cohere": ("CohereConfig", {"logit_scale": 1.0}),
    "ernie4.5": ("Ernie4_5Config", {}),
    "gemma": ("GemmaConfig", {}),
    "glm4": ("Glm4Config", {}),
    "glm4-moe": (
        "Glm4MoeConfig",
        {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
        | EXPERT_SIZE,
    ),
    "gpt-bigcode": ("GPTBigCodeConfig", {}),
    "granite": (
        "GraniteConfig",
        {"attention_multiplier": 0.1, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "hunyuan": ("HunYuanDenseV1Config", {}),
    "minimax-m2": ("MiniMaxM2Config", {"scoring_func": "sigmoid"} | LOCAL_EXPERTS),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mixtral": ("MixtralConfig", {"sliding_window": None} | LOCAL_EXPERTS),
    "olmo": ("OlmoConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "olmoe": ("OlmoeConfig", {"num_key_value_heads": 4} | EXPERTS),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {"sliding_window": None}),
    "phi-moe": ("PhimoeConfig", {"sliding_window": None, "num_local_experts": 4}),
    "qwen2": ("Qwen2Config", {}),  # biases on Q, K and V
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {"shared_expert_intermediate_size": 256} | EXPERTS | EXPERT_SIZE,
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 128}),  # norms on Q and K
    "qwen3-moe": ("Qwen3MoeConfig", EXPERTS | EXPERT_SIZE),  # asks the backend for its pool
    "smollm3": ("SmolLM3Config", {}),  # of those that SGLang serves with transformers' model
    "stablelm": ("StableLmConfig", {}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": None}),
}
"""Name: configuration class, and what sets the family apart from a Llama with two KV heads."""


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
    common["eos_token_id"] = common["pad_token_id"] = tokenizer.eos_token_id  # grammars need one
    config = getattr(transformers, config_class)(**{**SIZES, **common, **special, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, weight in model.named_parameters():
        # Biases start at 0 and norms at 1, which would hide a path that drops them.
        if name.endswith((".bias", "q_norm.weight", "k_norm.weight")):
            weight.data += 0.5 * torch.randn_like(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
