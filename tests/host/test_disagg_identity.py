"""Two instances whose models give other KV for the same tokens do not pass the handshake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sgl_kvq.errors import TransferError
from sgl_kvq.host.disagg.model_identity import model_identity
from sgl_kvq.transfer.protocol.handshake import check_fingerprint


def identity(path: Path | str, overrides: dict[str, Any] | None = None, **options: Any) -> Any:
    """Values of a model folder with the overrides of `--json-model-override-args`."""
    from sglang.srt.configs.model_config import ModelConfig

    model = ModelConfig(str(path), model_override_args=json.dumps(overrides or {}), **options)
    args = SimpleNamespace(tokenizer_path=None, model_path=str(path))
    return model_identity(model, args)


@pytest.fixture
def copy(tiny_model_path: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_path, tmp_path / "copy"))


def test_a_copy_and_a_shorter_context_are_the_same_model(tiny_model_path: str, copy: Path) -> None:
    check_fingerprint(identity(tiny_model_path), identity(copy, context_length=512))


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({"rope_theta": 7.5}, "rope: prefill"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope: prefill"),
        ({"rms_norm_eps": 0.5}, "config;"),
    ],
)
def test_overrides_are_compared(tiny_model_path: str, overrides: dict[str, Any], name: str) -> None:
    with pytest.raises(TransferError, match=name):
        check_fingerprint(identity(tiny_model_path), identity(tiny_model_path, overrides))


def test_files_are_compared(tiny_model_path: str, copy: Path) -> None:
    tokenizer = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(tokenizer + " ")
    with pytest.raises(TransferError, match="differ in tokenizer; start"):
        check_fingerprint(identity(tiny_model_path), identity(copy))
    (copy / "tokenizer.json").write_text(tokenizer)
    other = copy.with_name("other")  # SGLang reads a folder's configuration once
    shutil.copytree(copy, other)
    values = json.loads((other / "config.json").read_text()) | {"rms_norm_eps": 0.5}
    (other / "config.json").write_text(json.dumps(values))
    with pytest.raises(TransferError, match="differ in config; start"):
        check_fingerprint(identity(tiny_model_path), identity(other))
