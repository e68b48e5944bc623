"""Look at a local model folder before the server starts its processes."""

from __future__ import annotations

import json
from pathlib import Path

from sgl_kvq.errors import ConfigError


def check_model_files(model_path: str) -> None:
    """Refuse a local folder that cannot be a model. Names of a model hub pass unseen.

    Args:
        model_path: `--model-path`.

    Raises:
        ConfigError: the folder is missing, has no readable config.json, or a damaged weight file.
    """
    folder = Path(model_path).expanduser()
    if not folder.exists():
        if model_path.startswith((".", "/", "~")):
            raise ConfigError(f"--model-path: expected a model folder, {model_path} does not exist")
        return
    if folder.is_file():
        return
    config = folder / "config.json"
    try:
        json.loads(config.read_text())
    except OSError as error:
        raise ConfigError(
            f"--model-path {model_path}: expected a config.json in it, "
            f"got {error.strerror or error}; is this a Hugging Face model folder?"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"--model-path {model_path}: config.json is not valid JSON ({error}); fetch it again"
        ) from error
    for weights in sorted(folder.glob("*.safetensors")):
        _check_safetensors(weights)


def _check_safetensors(path: Path) -> None:
    """Read the header, which says how long the file must be."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"--model-path: {path} is damaged ({error}); fetch it again") from error
