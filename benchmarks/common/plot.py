"""Plots from checked-in results: python -m benchmarks.common.plot benchmarks/results/h100/*.csv."""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import matplotlib

from benchmarks.common.records import read_csv

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes


def plot_decode(rows: list[dict[str, str]], path: Path) -> None:
    """Speed-up over the better bf16 kernel by shape and format, and FlashInfer fp8 beside it."""
    by_shape: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if (row["head_dim"], row["gqa"]) == ("128", "4"):
            shape = by_shape[f"{row['batch']}x{row['length']}"]
            shape[row["format"]] = float(row.get("x_best_bf16") or row["x_bf16"])
            shape["FlashInfer fp8"] = float(row["us_bf16"]) / float(row["us_fp8"])
    axes = _speed_up_bars(by_shape)
    axes.set_xlabel("batch x length")
    axes.set_title(f"decode attention, GQA 32/8, head_dim 128, {rows[0]['gpu']}")
    axes.figure.savefig(path, dpi=110)


def plot_extend(rows: list[dict[str, str]], path: Path) -> None:
    """Speed-up over the better of FlashInfer's bf16 kernels by shape, format and prefill mode."""
    by_shape: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        name = f"{row['format']} {row['mode']}"
        by_shape[f"{row['fresh']} x {row['prefix']}"][name] = float(row["x_bf16"])
    axes = _speed_up_bars(by_shape)
    axes.set_xlabel("fresh tokens x cached prefix")
    axes.set_title(f"extend attention, GQA 32/8, head_dim 128, {rows[0]['gpu']}")
    axes.figure.savefig(path, dpi=110)


def _speed_up_bars(by_shape: dict[str, dict[str, float]]) -> Axes:
    """Grouped bars: a group a shape, a colour a system."""
    names = sorted({name for shape in by_shape.values() for name in shape})
    _, axes = plt.subplots(figsize=(10, 4), layout="tight")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [x + (i - len(names) / 2 + 0.5) * width for x in range(len(by_shape))]
        axes.bar(places, [shape[name] for shape in by_shape.values()], width, label=name)
    axes.set_xticks(range(len(by_shape)), list(by_shape))
    axes.set_ylabel("times as fast as FlashInfer bf16")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.legend(ncols=3, fontsize="small")
    return axes


def plot_append(rows: list[dict[str, str]], path: Path) -> None:
    """Microseconds a layer that storing and closing add to attention, by the pages that close."""
    figure, axes = plt.subplots(figsize=(6, 3.5))
    columns = [name for name in rows[0] if name.startswith("us_close_")]
    for row in rows:
        closing = [int(name.removeprefix("us_close_")) for name in columns]
        axes.plot(closing, [float(row[name]) for name in columns], "o-", label=row["format"])
    axes.set_xlabel("pages that fill in the step")
    axes.set_ylabel("us a layer, on top of attention")
    axes.set_title(
        f"append, {rows[0]['batch']} x {rows[0]['length']}, {rows[0]['layers']} layers, "
        f"{rows[0]['gpu']}"
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def plot_multi_agent(rows: list[dict[str, str]], path: Path) -> None:
    """Hit rate and throughput by the number of agents; dotted where a system's cache is full."""
    figure, (hits, speed) = plt.subplots(1, 2, figsize=(11, 4))
    for system in dict.fromkeys(row["system"] for row in rows):
        own = sorted((r for r in rows if r["system"] == system), key=lambda r: int(r["agents"]))
        agents = [int(row["agents"]) for row in own]
        label = f"{system}, {int(own[-1]['capacity_tokens']):,} tokens fit"
        (line,) = hits.plot(agents, [float(r["hit_rate"]) for r in own], "o-", label=label)
        speed.plot(agents, [float(r["total_tok_s"]) for r in own], "o-", label=label)
        over = [r for r in own if int(r["working_set_tokens"]) > int(r["capacity_tokens"])]
        if over:
            hits.axvline(int(over[0]["agents"]), color=line.get_color(), linestyle=":")
    hits.set(title="Prefix hit rate (dotted: transcripts no longer fit)", ylim=(0, 1))
    speed.set(title="Prompt and output tokens a second", ylim=(0, None))
    for axes in (hits, speed):
        axes.set_xlabel("agents at once")
        axes.set_xticks(sorted({int(row["agents"]) for row in rows}))
        axes.legend()
    figure.suptitle(f"{rows[0]['model']}, {rows[0]['device']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_tasks(rows: list[dict[str, str]], path: Path) -> None:
    """Right answers by task and system, a plot a model; error bars are of what sets off bf16."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, plots = plt.subplots(len(models), figsize=(12, 4 * len(models)), squeeze=False)
    for model, axes in zip(models, plots[:, 0], strict=True):
        own = [row for row in rows if row["model"] == model]
        tasks = list(dict.fromkeys(row["task"] for row in own))
        systems = list(dict.fromkeys((row["system"], row["calibration"]) for row in own))
        width = 0.8 / len(systems)
        for i, system in enumerate(systems):
            found = [row for row in own if (row["system"], row["calibration"]) == system]
            offset = (i - len(systems) / 2 + 0.5) * width
            shares = [int(row["passed"]) / int(row["n"]) for row in found]
            ends = [(float(row["low"] or 0), float(row["high"] or 0)) for row in found]
            errors = [(high - low) / 2 for low, high in ends]
            places = [tasks.index(row["task"]) + offset for row in found]
            name = ", ".join(filter(None, system))
            axes.bar(places, shares, width, yerr=errors, ecolor="grey", label=name)
        axes.set_xticks(range(len(tasks)), tasks)
        axes.set(title=f"{model}, {own[0]['device']}", ylabel="share of right answers")
        axes.set(ylim=(0, 1.25), yticks=[0, 0.25, 0.5, 0.75, 1])
        axes.legend(ncols=5, fontsize="small", loc="upper center")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Draw one PNG beside each results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    plots = {
        "decode": plot_decode,
        "extend": plot_extend,
        "append": plot_append,
        "multi_agent": plot_multi_agent,
        "tasks": plot_tasks,
    }
    for path in parser.parse_args().files:
        if path.stem not in plots:
            parser.error(f"{path}: expected one of {', '.join(f'{name}.csv' for name in plots)}")
        plots[path.stem](read_csv(path), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
