from __future__ import annotations

import pytest

from sgl_kvq.config import KVQuantConfig
from sgl_kvq.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "hack3"}, "--kv-quant: expected one of bf16, .* got 'hack3'"),
        ({"format": "hack2", "prefill": "fast"}, "--kv-quant-prefill: expected one of exact, quan"),
        (
            {"format": "hack2", "sink_tokens": 17},
            "--kv-quant-sink-tokens: expected 0 to 16, got 17",
        ),
        ({"format": "hack2", "sink_tokens": -1}, "--kv-quant-sink-tokens"),
        ({"format": "saw4", "hadamard_block": 24}, "--kv-quant-hadamard-block: expected a power"),
        ({"format": "hack2", "config_file": "x"}, "expected kvq2 or kvq4 as --kv-quant, got hack2"),
        ({"format": "hack2", "memory_gb": 0.0}, "--kv-quant-memory-gb: expected a positive"),
    ],
)
def test_bad_values_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KVQuantConfig(**options)  # type: ignore[arg-type]


def test_defaults() -> None:
    config = KVQuantConfig("hack2")
    assert (config.prefill, config.sink_tokens, config.quantized_prefill) == ("exact", 4, False)
