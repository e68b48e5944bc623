"""Results of the fidelity benchmark: rows, a table, and the Pareto plot."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tabulate import tabulate

TABLE = {
    "format": "format",
    "bits_per_element": "bits",
    "context": "context",
    "corpus": "corpus",
    "outliers": "outliers",
    "ppl_rel": "perplexity",
    "kl": "KL, nats",
    "top1": "top-1",
    "needle": "needles",
}


def table(rows: list[dict[str, str]]) -> str:
    """Rows of the results file as a table, intervals included."""
    cells = []
    for row in rows:
        shown = row | {"needle": ""}
        for name, style in (("ppl_rel", "+.2%"), ("kl", ".4f"), ("top1", ".1%")):
            if row[name]:
                parts = (format(float(row[name + part]), style) for part in ("", "_low", "_high"))
                shown[name] = "{} [{}, {}]".format(*parts)
        if row["needle_total"]:
            shown["needle"] = f"{row['needle_hits']}/{row['needle_total']}"
        cells.append([shown[name] for name in TABLE])
    return str(tabulate(cells, list(TABLE.values()), tablefmt="github", disable_numparse=True))


def plot_pareto(rows: list[dict[str, str]], path: Path) -> None:
    """Bits, metadata included, against the mean KL over corpora at the shortest context."""
    context = min((row["context"] for row in rows), key=int)
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        plain = row["outliers"] == "0" and row["context"] == context
        if plain and row["kl"] and row["format"] != "bf16":
            points[row["format"]].append((float(row["bits_per_element"]), float(row["kl"])))
    figure, axes = plt.subplots(figsize=(8, 5))
    for name, values in points.items():
        bits, kl = values[0][0], sum(value for _, value in values) / len(values)
        ours = name.startswith("kvq")
        axes.plot(bits, kl, "o" if ours else "s", color="C0" if ours else "C7")
        axes.annotate(name, (bits, kl), xytext=(5, 4), textcoords="offset points", fontsize=9)
    axes.margins(x=0.15)
    axes.set_yscale("log")
    axes.set_xlabel("bits per element, all metadata included")
    axes.set_ylabel("KL divergence from bf16, nats per token")
    axes.set_title(f"Fidelity, {rows[0]['model']}, {context} tokens, mean over corpora")
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
