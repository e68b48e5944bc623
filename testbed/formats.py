"""Formats by name, also those that only a calibrated file asks for."""

from __future__ import annotations

from sgl_kvq.formats.base import QuantFormat
from sgl_kvq.formats.families.kvq import kvq_format
from sgl_kvq.formats.registry import get_format


def named_format(name: str) -> QuantFormat:
    """A format of `--kv-quant`, or K:OUTLIER:V, a coding that `calibrate --budget-bits` chooses."""
    return kvq_format("kvq2", *map(int, name.split(":"))) if ":" in name else get_format(name)
