"""Rows of the results file: from grades to numbers, and to a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

from tabulate import tabulate

from benchmarks.tasks.cases import Grade
from benchmarks.tasks.paired import Pair, compare
from benchmarks.tasks.prompts import Prompt


def result_columns(
    prompts: Sequence[Prompt], grades: Sequence[Grade], reference: Sequence[Grade]
) -> dict[str, Any]:
    """Return what a row says about a system's grades, against those of 16-bit KV."""
    pairs = [
        Pair(prompt.case.group, own.passed, theirs.passed)
        for prompt, own, theirs in zip(prompts, grades, reference, strict=True)
    ]
    columns = asdict(compare(pairs))
    similarities = [grade.similarity for grade in grades if grade.similarity is not None]
    columns["similarity"] = mean(similarities) if similarities else ""
    return {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in columns.items()
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the results as a table, a task's systems below each other."""
    order = list(dict.fromkeys(row["task"] for row in rows))
    cells = [
        {
            "model": row["model"],
            "task": row["task"],
            "system": label(row),
            "n": row["n"],
            "passed": row["passed"],
            "of bf16's": row["bf16_passed"],
            "lost": row["lost"],
            "won": row["won"],
            "won - lost, 95%": interval(row),
            "p": row["p"],
            "similarity": row["similarity"],
        }
        for row in sorted(rows, key=lambda row: (row["model"], order.index(row["task"])))
    ]
    return str(tabulate(cells, headers="keys", tablefmt="github"))


def interval(row: dict[str, Any]) -> str:
    """Return the interval of what sets a system off bf16, nothing for bf16 itself."""
    return f"{float(row['low']):+.1%} to {float(row['high']):+.1%}" if row["low"] != "" else ""


def label(row: dict[str, Any]) -> str:
    """Return the name of a row's system, with its file."""
    return f"{row['system']}, {row['calibration']}" if row["calibration"] else str(row["system"])
