"""What of a model decides its KV beside its weights: configuration, overrides, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from sgl_kvq.transfer.protocol.handshake import local_folder
from sgl_kvq.transfer.protocol.messages import Fingerprint

_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
_OF_THE_COPY = ("_name_or_path", "transformers_version", "context_len", "torch_dtype", "dtype")
"""Values that may differ: paths, versions, the longest context, and the type that has its field."""
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)


def model_identity(model_config: Any, server_args: Any) -> Fingerprint:
    """Values for the handshake; overrides of the command line are in SGLang's configuration.

    Args:
        model_config: SGLang's `ModelConfig`.
        server_args: SGLang's `ServerArgs`.
    """
    text = model_config.hf_text_config.to_dict()
    config = _canonical(_without_copy(model_config.hf_config.to_dict()))
    rope = {name: text[name] for name in _ROPE if text.get(name) is not None}
    return {
        "rope": _canonical(rope)[:1024],
        "config": xxhash.xxh3_64_hexdigest(config.encode()),
        "tokenizer": tokenizer_digest(server_args.tokenizer_path or server_args.model_path),
    }


def tokenizer_digest(path: str) -> str:
    """Digest of a tokenizer's files: 16 hexadecimal digits, "none" without any.

    Args:
        path: `--tokenizer-path`, a folder or a name in the local Hugging Face cache.
    """
    folder = local_folder(path) or Path(path)
    state = xxhash.xxh3_64()
    found = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    for file in found:
        state.update(file.name.encode())
        state.update(file.read_bytes())
    return state.hexdigest() if found else "none"


def _without_copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_copy(v) for key, v in value.items() if key not in _OF_THE_COPY}
    return value


def _canonical(values: Any) -> str:
    return json.dumps(values, sort_keys=True, default=str)
