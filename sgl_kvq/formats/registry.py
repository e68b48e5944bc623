"""All formats by name."""

from __future__ import annotations

from sgl_kvq.errors import ConfigError
from sgl_kvq.formats import bf16, hack, kivi, kvq, saw
from sgl_kvq.formats.base import QuantFormat

_FORMATS: dict[str, QuantFormat] = {}
for _format in (*kvq.FORMATS, *hack.FORMATS, *kivi.FORMATS, *saw.FORMATS, *bf16.FORMATS):
    if _format.name in _FORMATS:
        raise ValueError(f"format {_format.name!r} is registered twice")
    _FORMATS[_format.name] = _format


def format_names() -> list[str]:
    """Names of all formats, in the order of the documentation."""
    return list(_FORMATS)


def get_format(name: str) -> QuantFormat:
    """Look a format up.

    Raises:
        ConfigError: no format has this name; the message lists those that exist.
    """
    try:
        return _FORMATS[name]
    except KeyError:
        raise ConfigError(
            f"--kv-quant: expected one of {', '.join(_FORMATS)}, got {name!r}"
        ) from None
