from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from sgl_kvq.transfer.protocol.handshake import weights_digest


def test_other_weights_have_another_digest(tmp_path: Path) -> None:
    """One bit of the last value changed; the size of the file stays."""
    model, copy = tmp_path / "model", tmp_path / "copy"
    model.mkdir()
    save_file({"weight": torch.arange(4096.0)}, model / "model.safetensors")
    shutil.copytree(model, copy)
    assert weights_digest(str(copy)) == weights_digest(str(model))
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert weights_digest(str(copy)) != weights_digest(str(model))
