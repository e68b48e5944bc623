"""A model folder without weights: a known model's geometry and a tokenizer made here."""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LLAMA_3_1_8B: Mapping[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""Source: config.json of Llama-3.1-8B; RoPE scaling left out, it changes no time."""

LLAMA_3_1_70B: Mapping[str, Any] = {
    **LLAMA_3_1_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
"""Source: config.json of Llama-3.1-70B; what is not named is as with 8B."""

QWEN2_5_1_5B: Mapping[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""Source: config.json of Qwen2.5-1.5B; Qwen2.5-Coder-1.5B has the same."""

GEOMETRIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "8b": ("out/llama-3.1-8b-geometry-{}-layers", LLAMA_3_1_8B),
    "70b": ("out/llama-3.1-70b-geometry-{}-layers", LLAMA_3_1_70B),
    "1.5b": ("out/qwen2.5-1.5b-geometry-{}-layers", QWEN2_5_1_5B),
}
"""Name: (model folder by its number of layers, fields of its `config.json`)."""


def geometry_folder(name: str, num_layers: int | None = None) -> Path:
    """Return the folder of a geometry of `GEOMETRIES`, made if it is not there.

    Args:
        name: A key of `GEOMETRIES`.
        num_layers: For trials; None takes the geometry's own.
    """
    folder, geometry = GEOMETRIES[name]
    num_layers = num_layers or int(geometry["num_hidden_layers"])
    return make_folder(Path(folder.format(num_layers)), num_layers, geometry)


def make_folder(folder: Path, num_layers: int, geometry: Mapping[str, Any] = LLAMA_3_1_8B) -> Path:
    """Write config and tokenizer for `--load-format dummy`; does nothing when they are there.

    Each token is a word of up to three letters, so that text made of n tokens is n tokens again
    and a streamed token is about as many bytes as one of English.

    Args:
        folder: Created; its name must be another one for another geometry or number of layers.
        num_layers: The geometry's own, or fewer for a trial.
        geometry: Fields of the model's `config.json`.
    """
    if (folder / "config.json").exists():
        return folder
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    vocab_size = int(geometry["vocab_size"])
    specials = ("<s>", "</s>")  # not words: a special token is found inside of words, too
    words = {word: token for token, word in enumerate(specials)}
    words |= {_word(token): token for token in range(len(specials), vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=specials[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=specials[0], eos_token=specials[1]
    ).save_pretrained(folder)
    fields = {**geometry, "num_hidden_layers": num_layers, "dtype": torch.bfloat16}
    AutoConfig.for_model(fields.pop("model_type"), **fields).save_pretrained(folder)
    return folder


def _word(token: int) -> str:
    """Return a different word for each token: its number in base 62, with digits of letters."""
    digits = string.ascii_letters + string.digits
    word = digits[token % 62]
    while token := token // 62:
        word += digits[token % 62]
    return word
