"""`python -m sgl_kvq formats`: a table of all registered formats."""

from __future__ import annotations

import argparse

from rich.table import Table

from sgl_kvq.commands.console import table_console
from sgl_kvq.formats.base import EXTRA_BITS, Coding, QuantFormat
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.registry import format_names, get_format

HEAD_DIMS = (64, 128)
COLUMNS = (
    "--kv-quant",
    "what it is",
    *(f"head_dim {size}" for size in HEAD_DIMS),
    "K",
    "V",
    "needs",
    "source",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options: none."""


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    table = Table(
        title="Bits of a stored number, metadata included (times as many tokens as in bf16)"
    )
    for column in COLUMNS:
        table.add_column(column)
    for name in format_names():
        table.add_row(*row(get_format(name)))
    table_console().print(table, markup=False)
    return 0


def row(quant_format: QuantFormat) -> list[str]:
    """Cells of one format, in the order of `COLUMNS`."""
    bits = [PageLayout(quant_format, head_dim, 1).bits_per_element for head_dim in HEAD_DIMS]
    return [
        quant_format.name,
        quant_format.help,
        *(f"{size:g} ({16 / size:.2f}x)" for size in bits),
        describe(quant_format.k),
        describe(quant_format.v),
        "calibrate, for best answers" if quant_format.calibration else "nothing",
        quant_format.source,
    ]


def describe(coding: Coding) -> str:
    """A coding in words."""
    if coding.is_raw:
        return "16-bit rows"
    text = f"{coding.num_bits} bits per {coding.axis}"
    if coding.outlier_16ths:
        text += f", {coding.num_bits + EXTRA_BITS} in {coding.outlier_16ths} of 16 channels"
    if coding.axis == "token" and not coding.whole_head:
        text += " and 64 channels"
    return text + (", Hadamard-rotated" if coding.rotated else "")
