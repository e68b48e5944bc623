"""`python -m sgl_kvq advise MODEL`: what each format loses on a model, and which to take."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from rich.table import Table

from sgl_kvq.commands.console import table_console
from sgl_kvq.errors import ConfigError
from sgl_kvq.fidelity.history import FormatHistory
from sgl_kvq.fidelity.loading import load_tokenizer
from sgl_kvq.fidelity.loss import REFUSE_NATS, WARN_NATS, Loss, mean_loss, verdict
from sgl_kvq.fidelity.teacher import Teacher
from sgl_kvq.fidelity.text import measured_ids
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.registry import calibrated_formats, format_names, get_format

COLUMNS = ("--kv-quant", "bits", "tokens in a GiB", "nats lost", "same top token", "a server")
CONTROL = "bf16"
GIB = 2**30


@dataclass(frozen=True)
class Measured:
    """One row of the table.

    Args:
        name: The format.
        config_file: `--kv-quant-config` that it was measured with.
        bits: Bits of a stored number, metadata included.
        tokens_per_gib: Tokens that closed pages of all layers hold in a GiB.
        loss: Against 16 bits.
    """

    name: str
    config_file: str | None
    bits: float
    tokens_per_gib: int
    loss: Loss

    def __str__(self) -> str:
        return self.name if self.config_file is None else f"{self.name} with the file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    names = [name for name in format_names() if name != CONTROL]
    parser.add_argument("model", help="Hugging Face folder or name")
    parser.add_argument(
        "--formats", nargs="+", choices=names, default=names, metavar="FORMAT", help="default: all"
    )
    parser.add_argument(
        "--kv-quant-config",
        metavar="FILE",
        help="file of `python -m sgl_kvq calibrate`: measure the formats that it goes with, too",
    )
    parser.add_argument(
        "--context", type=int, default=1024, help="tokens of the text, default: 1024"
    )
    parser.add_argument("--device", default="cpu", help="where the model runs, default: cpu")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="in what the model runs, default: float32",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="also draw loss against tokens (needs matplotlib)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print the table and the advice."""
    if args.context % PAGE_SIZE or args.context < 2 * PAGE_SIZE:
        raise ConfigError(
            f"--context: expected a multiple of {PAGE_SIZE} from {2 * PAGE_SIZE} on, "
            f"got {args.context}"
        )
    rows = measure(args)
    console = table_console()
    console.print(_table(rows, args))
    console.print(advice(rows, args.model), highlight=False, markup=False, soft_wrap=True)
    if args.plot is not None:
        plot(rows, args.plot, f"{Path(args.model).name}, {args.context} tokens")
    return 0


def measure(args: argparse.Namespace) -> list[Measured]:
    """Measure all formats on the built-in text, the smallest first.

    Args:
        args: Options of the command.

    Raises:
        ConfigError: no such model, or the file goes with none of the formats.
    """
    teacher = Teacher(args.model, getattr(torch, args.dtype), args.device)
    ids = measured_ids(load_tokenizer(args.model), args.context)
    config, device = teacher.model.config, args.device
    exact = teacher.hidden(ids, FormatHistory(CONTROL, config, device=device))[PAGE_SIZE:]
    rows = []
    for name, file in track(_candidates(args, teacher), "measuring"):
        history = FormatHistory(name, config, config_file=file, device=device)
        read = teacher.hidden(ids, history)[PAGE_SIZE:]
        loss = mean_loss(zip(teacher.logprobs(exact), teacher.logprobs(read), strict=True))
        tokens = int(GIB / history.bytes_per_token)
        rows.append(Measured(name, file, history.bits_per_element, tokens, loss))
    return sorted(rows, key=lambda row: (row.bits, row.loss.nats))


def _candidates(args: argparse.Namespace, teacher: Teacher) -> list[tuple[str, str | None]]:
    """Formats to measure, each with `--kv-quant-config` or without."""
    candidates: list[tuple[str, str | None]] = [(name, None) for name in args.formats]
    file = args.kv_quant_config
    if file is None:
        return candidates
    refusal = ConfigError(f"--kv-quant-config: no format of {', '.join(args.formats)} takes a file")
    for name in {found.name for found in calibrated_formats()} & set(args.formats):
        try:
            FormatHistory(name, teacher.model.config, config_file=file)
            candidates.append((name, file))
        except ConfigError as error:
            refusal = error
    if len(candidates) == len(args.formats):
        raise refusal
    return candidates


def advice(rows: list[Measured], model: str) -> str:
    """Name the format to take: the smallest that a server takes without a warning.

    Args:
        rows: What was measured, the smallest first.
        model: As the user gave it.
    """
    fine = [row for row in rows if row.loss.nats <= WARN_NATS]
    best = fine[0] if fine else min(rows, key=lambda row: row.loss.nats)
    why = f"the smallest that loses at most {WARN_NATS:g} nats a token" if fine else "loses least"
    flags = f"--kv-quant {best.name}"
    if best.config_file is not None:
        flags += f" --kv-quant-config {best.config_file}"
    text = f"take {flags}: {why}"
    tuned = {row.name for row in rows if row.config_file is not None}
    for row in rows[: rows.index(best) + 1]:
        if row.name not in tuned and get_format(row.name).calibration is not None:
            text += f"; {row.name} loses less after `python -m sgl_kvq calibrate {model}`"
            break
    return text


def plot(rows: list[Measured], path: Path, title: str) -> None:
    """Draw what each format loses against the tokens that fit.

    Args:
        rows: What was measured.
        path: File to write; its suffix says the kind.
        title: Of the picture.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot: expected matplotlib; pip install matplotlib") from error
    figure = Figure(figsize=(8, 5), layout="tight")
    axes = figure.add_subplot()
    for row in rows:
        point = (row.tokens_per_gib, row.loss.nats)
        axes.plot(*point, "o", color="C0" if row.name.startswith("kvq") else "C7")
        axes.annotate(str(row), point, xytext=(5, 4), textcoords="offset points", fontsize=9)
    for bound, label in ((WARN_NATS, "a server warns"), (REFUSE_NATS, "a server refuses")):
        axes.axhline(bound, linestyle="--", color="C3", linewidth=1)
        axes.annotate(
            label, (0.99, bound), xycoords=("axes fraction", "data"), ha="right", va="bottom"
        )
    axes.margins(x=0.15)
    axes.set_yscale("log")
    axes.set_xlabel("tokens in a GiB of closed pages")
    axes.set_ylabel("KL divergence from 16 bits, nats a token")
    axes.set_title(title)
    figure.savefig(path, dpi=110)
    sys.stdout.write(f"{path}\n")


def _table(rows: list[Measured], args: argparse.Namespace) -> Table:
    table = Table(title=f"{args.model}, {args.context} tokens of documentation")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[::5] else "right")
    for row in rows:
        table.add_row(
            str(row),
            f"{row.bits:.4g}",
            f"{row.tokens_per_gib:,}",
            f"{row.loss.nats:.4f}",
            f"{row.loss.same_top:.1%}",
            verdict(row.loss),
        )
    return table
