"""Figure of a compared suite: score by task with 95 % intervals and each seed, and mean score by learning rate.

python experiments/comparison_figure.py results/compare/smollm2/small.json docs/images/comparison.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from prefixmemory.analysis.figures import COLOURS, LINES, MARKERS, STYLE


def main(source: Path, target: Path) -> None:
    summary = json.loads(source.read_text())
    methods = [method["name"] for method in summary["methods"] if method["kind"] != "base"]  # it scores 0 on all tasks
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11.0, 3.6), width_ratios=[1.7, 1])
        draw_scores(left, summary, methods)
        draw_rates(right, summary, methods)
        left.legend(loc="upper center", bbox_to_anchor=(0.75, -0.15), ncols=4)
        figure.savefig(target, dpi=150, bbox_inches="tight")


def draw_scores(axis: Any, summary: dict[str, Any], methods: list[str]) -> None:
    """A group a task, a point a method; small points are seeds."""
    tasks = [task["name"] for task in summary["tasks"]]
    for place, method in enumerate(methods):
        cells = {cell["task"]: cell for cell in summary["cells"] if cell["method"] == method}
        found = [task for task in tasks if task in cells]
        at = [tasks.index(task) + (place - (len(methods) - 1) / 2) * 0.8 / len(methods) for task in found]
        mean = [cells[task]["mean"] for task in found]
        low = [cells[task]["mean"] - cells[task]["low"] for task in found]
        high = [cells[task]["high"] - cells[task]["mean"] for task in found]
        axis.errorbar(at, mean, yerr=[low, high], label=method, capsize=2, linestyle="", color=COLOURS[place],
                      marker=MARKERS[place], elinewidth=0.8)  # fmt: skip
        for x, task in zip(at, found, strict=True):
            scores = cells[task]["scores"]
            axis.plot([x + 0.04] * len(scores), scores, ".", color=COLOURS[place], markersize=2)
    axis.set_xticks(range(len(tasks)), tasks)
    axis.set(ylim=(-2, 102), ylabel="exact match (%)", title="Rate chosen by validation")


def draw_rates(axis: Any, summary: dict[str, Any], methods: list[str]) -> None:
    """Mean validation score over tasks at a third, once and three times each method's learning rate."""
    for place, method in enumerate(methods):
        points: dict[float, list[float]] = {}
        for one in summary["rates"]:
            if one["method"] == method and one["validation"] is not None:
                points.setdefault(one["factor"], []).append(one["validation"])
        if points:
            factors = sorted(points)
            means = [sum(points[factor]) / len(points[factor]) for factor in factors]
            axis.plot(factors, means, color=COLOURS[place], marker=MARKERS[place], linestyle=LINES[place % len(LINES)])
            axis.set_xscale("log")
            axis.set_xticks(factors, [f"{factor:g}" for factor in factors])
    axis.minorticks_off()
    axis.set(ylim=(-2, 102), xlabel="times the method's learning rate", title="Validation, mean over tasks, one seed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
