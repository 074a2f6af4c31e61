"""The table of what was screened, beside the runs of the first stage on the same rows.

python experiments/search/screened.py > results/screen/table.md
"""

import json
import statistics
from pathlib import Path
from typing import Any

from screen import TASKS, VARIANTS

from prefixmemory.compare.records import read_records

RESULTS = Path(__file__).parents[2] / "results" / "compare"
#: Variant -> what it changes, or stands beside.
CHANGES = {
    "full-question (6e-3)": "default (rank 8, start)",
    "rank8-question": "default (rank 8, start)",
    "full-question-fixed (6e-3)": "full-question (6e-3)",
    "full-question": "full-question (6e-3)",
    "full-question-muon": "full-question (6e-3)",
    "full-question-average": "full-question (6e-3)",
    "full-question-fresh-fast": "full-question (6e-3)",
    "full-question-ff": "full-question",
    "full-question-fresh": "full-question",
    "full-question-ff-all-fresh-mixed": "lora-fresh",
    "ff-all-question-fresh": "lora-fresh",
    "rank8-question-ff-all-fresh": "lora-fresh",
    "rank8-question-ff-plain-fresh": "lora-fresh",
    "rank8-everywhere-question-fresh": "lora-fresh",
    "built-ff-quarter": "lora-fresh",
    "built-ff-quarter-prompt": "built-ff-quarter",
    "built-ff-tenth": "built-ff-quarter",
    "built-ff-answer": "built-ff-quarter",
    "built-ff-answer-full": "built-ff-quarter",
    "built-ff-answer-10": "built-ff-answer",
    "built-ff-quarter-gradient": "built-ff-quarter",
    "built-ff-unlimited": "built-ff-quarter",
    "built-ff-unlimited-fast": "built-ff-quarter",
    "full-start-ff-all-fresh": "lora-fresh",
    "full-start-ff-all-fresh-low": "lora-fresh",
    "lora-attention-fresh": "lora-fresh",
    "full-question-mini": "full-question (6e-3)",
    "lora-fresh": "LoRA, all linear",
}
NAMES = {
    "prefixmemory": "default (rank 8, start)",
    "lora-all-linear": "LoRA, all linear",
    "full-question": "full-question (6e-3)",
    "full-question-distractors": "full-question-fixed (6e-3)",
}
MEASURES = {"match": "alone", "match_behind": "behind text", "nats": "nats, alone", "nats_behind": "nats, behind"}


def runs() -> dict[str, dict[tuple[str, int], dict[str, Any]]]:
    """Variant -> (task, seed) -> its record."""
    found: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    for record in read_records(RESULTS / "search" / "records.jsonl"):
        if record.run.task in TASKS and record.run.method in NAMES and record.test and record.training:
            behind = record.long_input["300"]
            found.setdefault(NAMES[record.run.method], {})[record.run.task, record.run.seed] = {
                "parameters": record.training.trainable_parameters,
                "match": record.test.metrics["greedy match (%)"],
                "match_behind": behind.metrics["greedy match (%)"],
                "nats": -record.test.score,
                "nats_behind": -behind.score,
            }
    for line in (RESULTS.parent / "screen" / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["variant"], {})[record["task"], record["seed"]] = record
    return found


def main() -> None:
    """Print the table."""
    found = runs()
    print("Greedy match in percent and nats a token, means of the runs; below, the paired difference to what a variant")
    print("changes, or stands beside, over the runs that both have, and its standard error. Means over different runs")
    print("do not stand beside each other: goemotions has lower matches than banking77.\n")
    print(
        f"| variant | beside | parameters | runs | {' | '.join(MEASURES.values())} |\n|{'---|' * (4 + len(MEASURES))}"
    )
    for name in sorted(found, key=lambda name: (name in VARIANTS, list(found).index(name))):
        own, changed = found[name], CHANGES.get(name, "")
        cells = []
        for measure in MEASURES:
            digits = 1 if measure.startswith("match") else 3
            cell = f"{statistics.fmean(one[measure] for one in own.values()):.{digits}f}"
            pairs = [own[run][measure] - found[changed][run][measure] for run in own if run in found.get(changed, {})]
            if len(pairs) > 1:
                error = statistics.stdev(pairs) / len(pairs) ** 0.5
                cell += f"<br>{statistics.fmean(pairs):+.{digits}f} ± {error:.{digits}f}"
            cells.append(cell)
        size = next(iter(own.values()))["parameters"]
        print(f"| {name} | {changed} | {size:,} | {len(own)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
