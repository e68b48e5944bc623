"""All formats by name: those of `sgl_kvq.formats.families` and those of other packages.

Another package adds formats by an entry point of the group `sgl_kvq.formats` that names a module
which calls `register` when it is imported:

    [project.entry-points."sgl_kvq.formats"]
    mine = "my_package.my_formats"

Modules with formats are imported when somebody first asks for one.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from sgl_kvq.errors import ConfigError
from sgl_kvq.formats.base import QuantFormat

ENTRY_POINT_GROUP = "sgl_kvq.formats"

logger = logging.getLogger(__name__)
_formats: dict[str, QuantFormat] = {}


def register(quant_format: QuantFormat) -> QuantFormat:
    """Make a format known under its name.

    Args:
        quant_format: The format.

    Returns:
        The same object.

    Raises:
        ValueError: another format has this name.
    """
    _import_families()  # so that whoever takes one of our names is told at once
    if quant_format.name in _formats:
        raise ValueError(
            f"name: expected one that no format has, got {quant_format.name!r}, which is registered"
        )
    _formats[quant_format.name] = quant_format
    return quant_format


def format_names() -> list[str]:
    """Names of all formats, sorted."""
    _import_modules()
    return sorted(_formats)


def get_format(name: str) -> QuantFormat:
    """Look a format up.

    Raises:
        ConfigError: no format has this name; the message lists those that exist.
    """
    _import_modules()
    try:
        return _formats[name]
    except KeyError:
        raise ConfigError(
            f"--kv-quant: expected one of {', '.join(format_names())}, got {name!r}"
        ) from None


def calibrated_formats() -> list[QuantFormat]:
    """Formats that `python -m sgl_kvq calibrate` can prepare a model for, by name."""
    return [found for found in map(get_format, format_names()) if found.calibration is not None]


@cache
def _import_families() -> None:
    """Import our own formats. A module that is being imported when it calls this is skipped."""
    folder = Path(__file__).with_name("families")
    for module in pkgutil.iter_modules([str(folder)], f"{__package__}.families."):
        importlib.import_module(module.name)


@cache
def _import_modules() -> None:
    """Import every module that registers formats. A broken package must not stop the others."""
    _import_families()
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry.load()
        except Exception as error:
            logger.warning("formats of %s are left out: %s", entry.value, error)
