"""Fidelity of KV formats on real text: python -m benchmarks.fidelity --formats hack2 kvq2 ..."""

from __future__ import annotations

import argparse
import math
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.common.records import command_line, git_commit, read_csv, write_csv
from benchmarks.fidelity.corpora import CORPORA, segments
from benchmarks.fidelity.metrics import estimate, join, relative_perplexity, score
from benchmarks.fidelity.needle import CITIES, NeedleText, count_hits, needle_texts
from benchmarks.fidelity.outliers import inject
from benchmarks.fidelity.report import plot_pareto, table
from sgl_kvq.commands.calibrate import command as calibrate
from sgl_kvq.fidelity.history import FormatHistory
from sgl_kvq.fidelity.teacher import Teacher
from sgl_kvq.formats.registry import format_names

CALIBRATED = "+calibrated"
CHOSEN = "+chosen"  # with --budget-bits at the size of the format itself, head_dim 64
BUDGETS = {
    CALIBRATED: [],
    f"kvq2{CHOSEN}": ["--budget-bits", "2.875"],
    f"kvq4{CHOSEN}": ["--budget-bits", "4.5625"],
}
WINDOW = "+window"  # one closed page before the own one still read as 16-bit rows; offline only
NEEDLES = "needles"
_INTERVALS = [name + part for name in ("ppl_rel", "kl", "top1") for part in ("", "_low", "_high")]
SCORE_COLUMNS = ("tokens", "ppl", *_INTERVALS)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse(argv: list[str] | None) -> Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fidelity", description=__doc__.split(":")[0]
    )
    ours = [
        f"{base}{suffix}"
        for base in ("kvq2", "kvq4")
        for suffix in (CALIBRATED, CHOSEN, WINDOW, CALIBRATED + WINDOW, CHOSEN + WINDOW)
    ]
    names = [*format_names(), *ours]
    parser.add_argument("--model", type=Path, default=Path(".model/smollm2-135m"))
    parser.add_argument("--formats", nargs="+", choices=names, metavar="FORMAT", default=names)
    parser.add_argument("--contexts", default="2048", help="tokens, separated by commas")
    corpora = [*CORPORA, NEEDLES]
    parser.add_argument("--corpora", nargs="+", choices=corpora, default=corpora)
    parser.add_argument("--segments", type=int, default=2, help="texts of each corpus and length")
    parser.add_argument(
        "--layer-errors", action="store_true", help="write layer_errors.csv instead, of one text"
    )
    parser.add_argument("--sink-tokens", type=int, default=4)
    parser.add_argument(
        "--inject-outliers",
        action="store_const",
        const=1,
        default=0,
        help="into K, see outliers.py",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--device", default="cpu", help="where the model runs, default: cpu")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/fidelity"),
        help="rows of an earlier run in this folder stay unless measured again",
    )
    return parser.parse_args(argv)


def calibrated_file(model: Path, args: Namespace, name: str) -> str:
    """File of `calibrate` for a name that ends with `CALIBRATED` or `CHOSEN`, made once."""
    paths = {
        suffix: args.out / f"{model.name}-{suffix.lstrip('+')}.safetensors" for suffix in BUDGETS
    }
    if not all(path.exists() for path in paths.values()):
        parser = argparse.ArgumentParser()
        calibrate.add_arguments(parser)
        command = [str(model), "--device", args.device, "--out", str(paths[CALIBRATED])]
        collected = calibrate.collect(parser.parse_args(command))
        for suffix, budget in BUDGETS.items():
            options = ["--out", str(paths[suffix]), *budget]
            calibrate.write(parser.parse_args([str(model), *options]), collected)
        collected.path.unlink()
    return str(paths[name if name in paths else CALIBRATED])


def make_history(name: str, args: Namespace, model: Path, teacher: Teacher) -> FormatHistory:
    """Make what a format stores, with what the name's suffixes say."""
    plain = name.removesuffix(WINDOW)
    base, _, calibrated = plain.partition("+")
    return FormatHistory(
        base,
        teacher.model.config,
        args.sink_tokens,
        calibrated_file(model, args, plain) if calibrated else None,
        window_pages=int(plain != name),
        device=args.device,
    )


def measure(args: Namespace, model: Path) -> Iterator[dict[str, Any]]:
    """Score all formats on all texts; yields one row of results after the other."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    teacher = Teacher(model, DTYPES[args.dtype], args.device)
    exact = FormatHistory("bf16", teacher.model.config, device=args.device)
    histories = {name: make_history(name, args, model, teacher) for name in args.formats}
    for context in map(int, args.contexts.split(",")):
        for corpus in args.corpora:
            texts: list[tuple[torch.Tensor, torch.Tensor]] = []
            needles: list[NeedleText] = []
            if corpus == NEEDLES:
                needles = needle_texts(tokenizer, context, args.segments)
            else:
                ids = segments(corpus, tokenizer, context, args.segments)
                texts = [(text, teacher.hidden(text, exact)) for text in ids]
            for name, history in histories.items():
                row: dict[str, Any] = {"model": args.model.name, "format": name}
                row["bits_per_element"] = round(history.bits_per_element, 4)
                row |= {"context": context, "corpus": corpus, "outliers": args.inject_outliers}
                row |= dict.fromkeys(SCORE_COLUMNS, "")
                if texts:
                    row |= summary(teacher, texts, history)
                row["needle_hits"] = count_hits(teacher, needles, history) if needles else ""
                row["needle_total"] = len(needles) * len(CITIES) or ""
                yield row


def summary(
    teacher: Teacher, texts: list[tuple[torch.Tensor, torch.Tensor]], history: FormatHistory
) -> dict[str, Any]:
    """Columns of one format on texts (ids, last hidden states with 16-bit KV)."""
    scores = join([score(teacher, ids, reference, history) for ids, reference in texts])
    columns: dict[str, Any] = {
        "tokens": len(scores.nll),
        "ppl": round(math.exp(float(scores.nll.mean())), 4),
    }
    estimates = {
        "ppl_rel": relative_perplexity(scores),
        "kl": estimate(scores.kl),
        "top1": estimate(scores.agrees),
    }
    for name, found in estimates.items():
        for part, value in asdict(found).items():
            columns[name if part == "value" else f"{name}_{part}"] = round(value, 5)
    return columns


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, write `fidelity.csv` and `pareto.png`."""
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    model = args.model
    if args.inject_outliers:
        model = args.out / f"{args.model.name}-outliers"
        if not model.exists():
            inject(args.model, model)
    made_by = {
        "dtype": args.dtype,
        "commit": git_commit(),
        "command": command_line("fidelity", sys.argv[1:] if argv is None else argv),
    }
    if args.layer_errors:
        write_csv(args.out / "layer_errors.csv", [r | made_by for r in layer_errors(args, model)])
        return
    path = args.out / "fidelity.csv"
    rows = {_key(row): row for row in (read_csv(path) if path.exists() else [])}
    for row in measure(args, model):
        found = {name: str(value) for name, value in (row | made_by).items()}
        rows[_key(found)] = found
        print(table([found]).splitlines()[-1], flush=True)
        write_csv(path, list(rows.values()))
    print(table(list(rows.values())))
    plot_pareto(list(rows.values()), args.out / "pareto.png")


def layer_errors(args: Namespace, model: Path) -> list[dict[str, Any]]:
    """Relative squared error of each query head's output, given the layers before as they are."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    teacher = Teacher(model, DTYPES[args.dtype], args.device)
    (ids,) = segments(args.corpora[0], tokenizer, int(args.contexts.split(",")[0]), 1)
    rows: list[dict[str, Any]] = []
    for name in args.formats:
        history = make_history(name, args, model, teacher)
        history.errors = {}
        teacher.hidden(ids, history)
        for layer, heads in sorted(history.errors.items()):
            rows += [
                {"format": name, "layer": layer, "head": head, "relative_error": f"{error:.3e}"}
                for head, error in enumerate(heads.tolist())
            ]
    return rows


def _key(row: dict[str, str]) -> tuple[str, ...]:
    """Key of a row; a new measurement replaces the row with the same one."""
    names = ("model", "format", "context", "corpus", "outliers", "needle_total")
    return tuple(row[name] for name in names)


if __name__ == "__main__":
    main()
