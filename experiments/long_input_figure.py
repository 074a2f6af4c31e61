"""Figure of a compared suite: score behind unrelated text, one panel a task; band: the 95 % interval.

python experiments/long_input_figure.py results/compare/smollm2/path.json docs/images/path.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from prefixmemory.analysis.figures import COLOURS, IN_FRONT, LINES, MARKERS, STYLE


def main(source: Path, target: Path) -> None:
    summary = json.loads(source.read_text())
    tasks = [task["name"] for task in summary["tasks"]]
    methods = [method["name"] for method in summary["methods"] if method["kind"] != "base"]  # it scores 0 everywhere
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(tasks), figsize=(4.0 * len(tasks), 3.2), sharey=True, squeeze=False)
        for axis, task in zip(axes[0], tasks, strict=True):
            for place, method in enumerate(methods):
                cell = next((c for c in summary["cells"] if (c["task"], c["method"]) == (task, method)), None)
                if cell is None:
                    continue
                lengths = sorted(cell["long_input"], key=int)
                scored = [cell["long_input"][length] for length in lengths]
                shifted = [int(length) * (1 + 0.02 * place) for length in lengths]  # intervals beside each other
                low = [one["mean"] - one["low"] for one in scored]
                high = [one["high"] - one["mean"] for one in scored]
                axis.errorbar(shifted, [one["mean"] for one in scored], yerr=[low, high], label=method, capsize=2,
                              color=COLOURS[place], linestyle=LINES[place % len(LINES)], marker=MARKERS[place],
                              elinewidth=0.6)  # fmt: skip
            axis.set_xscale("symlog", linthresh=300)
            axis.set_xticks([int(length) for length in lengths], [f"{int(length):,}" for length in lengths])
            axis.minorticks_off()
            axis.set(title=task, xlabel=IN_FRONT, ylim=(0, 100))
        axes[0][0].set_ylabel(f"exact match (%), {len(cell['seeds'])} seeds × {scored[0]['rows']} rows")
        axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.tight_layout()
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
