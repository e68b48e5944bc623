"""Small model folders with random weights: architectures that SGLang serves, not languages."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

WRAPPER = "TransformersForCausalLM"
"""SGLang's class of the models that it runs with transformers' own code."""

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


class Family(NamedTuple):
    """A kind of attention layer, or of model around it.

    Args:
        served_class: SGLang's class that serves it.
        config_class: Configuration in transformers.
        changes: What sets it apart from a Llama with two KV heads.
    """

    served_class: str
    config_class: str
    changes: dict[str, Any]


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", {}),
    "llama-mha": Family("LlamaForCausalLM", "LlamaConfig", {"num_key_value_heads": 4}),
    "arcee": Family("ArceeForCausalLM", "ArceeConfig", {}),
    "cohere": Family("CohereForCausalLM", "CohereConfig", {"logit_scale": 1.0}),
    "ernie4.5": Family("Ernie4_5_ForCausalLM", "Ernie4_5Config", {}),
    "gemma": Family("GemmaForCausalLM", "GemmaConfig", {}),
    "glm4": Family("Glm4ForCausalLM", "Glm4Config", {}),
    "glm4-moe": Family(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
        | EXPERT_SIZE,
    ),
    "gpt-bigcode": Family("GPTBigCodeForCausalLM", "GPTBigCodeConfig", {}),
    "granite": Family(
        "GraniteForCausalLM",
        "GraniteConfig",
        {"attention_multiplier": 0.1, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "granite-moe": Family(
        "GraniteMoeForCausalLM", "GraniteMoeConfig", {"attention_multiplier": 0.1} | LOCAL_EXPERTS
    ),
    "hunyuan": Family("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", {"use_qk_norm": True}),
    "mistral": Family("MistralForCausalLM", "MistralConfig", {"sliding_window": None}),
    "mixtral": Family(
        "MixtralForCausalLM", "MixtralConfig", {"sliding_window": None} | LOCAL_EXPERTS
    ),
    "olmo": Family("OlmoForCausalLM", "OlmoConfig", {"num_key_value_heads": 4}),
    "olmo2": Family("Olmo2ForCausalLM", "Olmo2Config", {}),
    "olmoe": Family("OlmoeForCausalLM", "OlmoeConfig", {"num_key_value_heads": 4} | EXPERTS),
    "phi": Family(
        "PhiForCausalLM", "PhiConfig", {"num_key_value_heads": 4, "intermediate_size": 1024}
    ),
    "phi3": Family("Phi3ForCausalLM", "Phi3Config", {"sliding_window": None}),
    "phi-moe": Family(
        "PhiMoEForCausalLM", "PhimoeConfig", {"sliding_window": None, "num_local_experts": 4}
    ),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", {}),  # biases on Q, K and V
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 128}),  # norms on Q and K
    # Asks the backend for its pool.
    "qwen3-moe": Family("Qwen3MoeForCausalLM", "Qwen3MoeConfig", EXPERTS | EXPERT_SIZE),
    "smollm3": Family(WRAPPER, "SmolLM3Config", {}),
    "starcoder2": Family("Starcoder2ForCausalLM", "Starcoder2Config", {"sliding_window": None}),
}
"""By name."""


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
    known = FAMILIES[family]
    common = {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "dtype": dtype}
    common["eos_token_id"] = common["pad_token_id"] = tokenizer.eos_token_id  # grammars need one
    config = getattr(transformers, known.config_class)(
        **{**SIZES, **common, **known.changes, **changes}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, weight in model.named_parameters():
        # Biases start at 0 and norms at 1, which would hide a path that drops them.
        if name.endswith((".bias", "q_norm.weight", "k_norm.weight")):
            weight.data += 0.5 * torch.randn_like(weight)
    model.save_pretrained(folder)
    if known.served_class != WRAPPER:  # some classes have another name in transformers
        config.architectures = [known.served_class]
        config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
