"""The table of formats and the geometry of models that commands share."""

from __future__ import annotations

import subprocess
import sys

import pytest
from transformers import (
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from sgl_kvq.commands.formats import COLUMNS, row
from sgl_kvq.errors import ConfigError
from sgl_kvq.fidelity.geometry import ModelGeometry, model_geometry
from sgl_kvq.formats.registry import format_names, get_format


def test_the_table_lists_every_format_without_sglang() -> None:
    code = (
        "import sys; from sgl_kvq.__main__ import main; assert main(['formats']) == 0;"
        "assert 'sglang' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in format_names():
        assert f" {name} " in done.stdout


def test_rows_say_what_a_format_stores() -> None:
    assert len(row(get_format("bf16"))) == len(COLUMNS)
    assert row(get_format("hack2"))[:6] == [
        "hack2",
        "HACK, 2-bit keys per channel, 2-bit values per token",
        "2.5 (6.40x)",
        "2.5 (6.40x)",
        "2 bits per channel",
        "2 bits per token and 64 channels",
    ]
    kvq4 = row(get_format("kvq4"))
    assert kvq4[2:5] == [
        "4.5625 (3.51x)",
        "4.4375 (3.61x)",
        "4 bits per channel, 6 in 1 of 16 channels",
    ]
    assert kvq4[6].startswith("calibrate")
    assert row(get_format("saw4"))[4] == "4 bits per token, Hadamard-rotated"


SMALL = {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(**SMALL, num_key_value_heads=2), ModelGeometry(24, 14, 2, 64)),
        (Qwen2Config(**SMALL, num_key_value_heads=2), ModelGeometry(24, 14, 2, 64)),
        (Qwen3Config(**SMALL, num_key_value_heads=2), ModelGeometry(24, 14, 2, 128)),
        (MistralConfig(**SMALL, num_key_value_heads=7), ModelGeometry(24, 14, 7, 64)),
        (MistralConfig(**SMALL, head_dim=None), ModelGeometry(24, 14, 8, 64)),
        (Phi3Config(**SMALL), ModelGeometry(24, 14, 14, 64)),
        (Gemma3TextConfig(**SMALL, num_key_value_heads=2), ModelGeometry(24, 14, 2, 256)),
        (
            Gemma3Config(text_config=SMALL | {"num_key_value_heads": 1, "head_dim": 128}),
            ModelGeometry(24, 14, 1, 128),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_geometry_of_a_model(config: PreTrainedConfig, expected: ModelGeometry) -> None:
    assert model_geometry(config) == expected


@pytest.mark.parametrize("config", [MambaConfig()], ids=lambda value: type(value).__name__)
def test_a_model_without_attention_is_refused(config: PreTrainedConfig) -> None:
    with pytest.raises(ConfigError, match="expected a model with layers of attention heads, Mamba"):
        model_geometry(config)
