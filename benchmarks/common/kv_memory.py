"""The same bytes of KV memory for every system that is compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sgl_kvq.formats.registry import get_format

PAGE_SIZE = 64
STOCK = "bf16"
STOCK_FP8 = "fp8"


@dataclass(frozen=True)
class ModelShape:
    """What the KV cache's size depends on.

    Attributes:
        bytes_per_token: Bytes of one token's 16-bit keys and values in all layers.
        num_kv_heads: KV heads of a layer.
        context_tokens: Longest sequence that the model takes.
    """

    bytes_per_token: int
    num_kv_heads: int
    context_tokens: int

    @classmethod
    def read(cls, model: Path) -> ModelShape:
        """Read the shape from a Hugging Face folder."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model).get_text_config()
        num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        bytes_per_token = config.num_hidden_layers * num_kv_heads * head_dim * 2 * 2
        return cls(bytes_per_token, num_kv_heads, config.max_position_embeddings)

    def bytes_of_rank(self, tp: int) -> int:
        """Return the bytes of one token on each of `tp` GPUs, which share out the KV heads."""
        return self.bytes_per_token // min(tp, self.num_kv_heads)


def kv_flags(system: str, kv_bytes: int, shape: ModelShape, tp: int = 1) -> list[str]:
    """Return the flags that give a server `kv_bytes` of KV memory on each GPU.

    Args:
        system: `STOCK`, `STOCK_FP8` (half the bytes of a token), or a value of `--kv-quant`.
        kv_bytes: Of one GPU, everything included.
        shape: Of the model.
        tp: GPUs of the server.
    """
    if system in (STOCK, STOCK_FP8):
        token_bytes = shape.bytes_of_rank(tp) // (2 if system == STOCK_FP8 else 1)
        pages = kv_bytes // (token_bytes * PAGE_SIZE)
        return ["--max-total-tokens", str(pages * PAGE_SIZE)]
    return ["--kv-quant-memory-gb", f"{kv_bytes / 2**30:.9f}"]


def system_flags(system: str) -> list[str]:
    """Return the flags that choose how a server stores KV."""
    if system == STOCK:
        return []
    if system == STOCK_FP8:
        return ["--kv-cache-dtype", "fp8_e4m3"]
    return ["--kv-quant", system]


def calibration_flags(system: str, file: Path | None) -> list[str]:
    """Return the flags that give a server its file of bases, none if it takes none."""
    if file is None or system in (STOCK, STOCK_FP8) or get_format(system).calibration is None:
        return []
    return ["--kv-quant-config", str(file)]


def server_flags(
    system: str, shape: ModelShape, kv_tokens: int | None, mem_fraction: float = 0.85, tp: int = 1
) -> list[str]:
    """Return the flags of a system with its share of memory.

    Args:
        system: See `kv_flags`.
        shape: Of the model.
        kv_tokens: Bytes of KV memory of each GPU, in bf16 tokens of all KV heads whatever `tp` is;
            None takes what `mem_fraction` leaves.
        mem_fraction: SGLang's `--mem-fraction-static`.
        tp: GPUs of the server.
    """
    flags = system_flags(system) + (["--tp-size", str(tp)] if tp > 1 else [])
    if kv_tokens is None:
        return [*flags, "--mem-fraction-static", str(mem_fraction)]
    return flags + kv_flags(system, kv_tokens * shape.bytes_per_token, shape, tp)
