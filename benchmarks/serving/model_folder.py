"""A model folder without weights: Llama-3.1-8B's geometry and a tokenizer made here."""

from __future__ import annotations

import string
from pathlib import Path

LLAMA_3_1_8B = {
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


def make_folder(folder: Path, num_layers: int) -> Path:
    """Write config and tokenizer for `--load-format dummy`; does nothing when they are there.

    Each token is a word of up to three letters, so that text made of n tokens is n tokens again
    and a streamed token is about as many bytes as one of English.

    Args:
        folder: Created; its name must be another one for another number of layers.
        num_layers: 32, or fewer for a trial.
    """
    if (folder / "config.json").exists():
        return folder
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    vocab_size = int(LLAMA_3_1_8B["vocab_size"])
    specials = ("<s>", "</s>")  # not words: a special token is found inside of words, too
    words = {word: token for token, word in enumerate(specials)}
    words |= {_word(token): token for token in range(len(specials), vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=specials[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=specials[0], eos_token=specials[1]
    ).save_pretrained(folder)
    geometry = {**LLAMA_3_1_8B, "num_hidden_layers": num_layers}
    config = LlamaConfig(**geometry, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    return folder


def _word(token: int) -> str:
    """Return a different word for each token: its number in base 62, with digits of letters."""
    digits = string.ascii_letters + string.digits
    word = digits[token % 62]
    while token := token // 62:
        word += digits[token % 62]
    return word
