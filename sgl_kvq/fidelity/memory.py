"""Losses that were measured before, one file each in the user's cache folder."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path

from sgl_kvq.fidelity.loss import Loss

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where losses are kept: below `XDG_CACHE_HOME`, else below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sgl_kvq" / "loss"


def recall(key: str) -> Loss | None:
    """The loss that was kept under a key; None if none was, or if its file is damaged.

    Args:
        key: Digest of everything that decides the loss; a file's name.
    """
    try:
        kept = json.loads((cache_folder() / f"{key}.json").read_text())
        return Loss(float(kept["nats"]), float(kept["same_top"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def remember(key: str, loss: Loss) -> None:
    """Keep a loss; a folder that cannot be written costs the next start a measurement.

    Args:
        key: As of `recall`.
        loss: What was measured.
    """
    path = cache_folder() / f"{key}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(f".{os.getpid()}")
        whole.write_text(json.dumps(asdict(loss)))
        whole.replace(path)
    except OSError as error:
        logger.warning("%s cannot be written (%s): the loss is measured at each start", path, error)
