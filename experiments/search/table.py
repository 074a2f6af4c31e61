"""The table of issue 13's search: paired differences to the default, alone and behind text, from the records.

python experiments/search/table.py results/compare/search/records.jsonl > results/compare/search/table.md
"""

import sys
from pathlib import Path

import numpy as np

from prefixmemory.compare.intervals import Points, difference, interval, mean
from prefixmemory.compare.records import Record, Scores, read_records

DEFAULT = "prefixmemory"
BEHIND = "300"
#: Measure -> the scores of a record that it reads, and its value for each row of them.
MEASURES = {
    "nats, alone": (lambda record: record.test, lambda scores: -np.array(scores.points)),
    "nats, behind text": (lambda record: record.long_input[BEHIND], lambda scores: -np.array(scores.points)),
    "greedy match, alone": (lambda record: record.test, lambda scores: 100.0 * np.array(scores.greedy)),
    "greedy match, behind text": (
        lambda record: record.long_input[BEHIND],
        lambda scores: 100.0 * np.array(scores.greedy),
    ),
}


def points(records: list[Record], measure: str) -> Points:
    """seed -> value of each row."""
    of_record, of_scores = MEASURES[measure]
    scores: dict[int, Scores] = {record.run.seed: of_record(record) for record in records}
    return {seed: of_scores(one) for seed, one in sorted(scores.items())}


def verdict(found: dict[str, tuple[float, tuple[float, float] | None]], complete: bool) -> str:
    """By the rule in ``experiments/search/first.yaml``."""
    alone, behind = found["nats, alone"][1], found["nats, behind text"][1]
    if not complete or alone is None or behind is None:
        return "runs are missing"
    if alone[0] > 0 or behind[1] >= 0:
        return "drop"
    return "keep" if alone[1] < 0.02 else "undecided"


def main(file: Path) -> None:
    """Print the table."""
    runs: dict[str, dict[str, list[Record]]] = {}
    for record in read_records(file):
        if record.failure is None and record.run.stage == "final":
            runs.setdefault(record.run.method, {}).setdefault(record.run.task, []).append(record)
    tasks = list(runs[DEFAULT])
    total = sum(map(len, runs[DEFAULT].values()))
    print("Mean over tasks; below it, the paired difference to the default with its 95 % interval, over the tasks and")
    print("seeds that both have.\n")
    print(f"| method | parameters | runs | {' | '.join(MEASURES)} | essay, nats | |\n|{'---|' * (len(MEASURES) + 5)}")
    for method, by_task in runs.items():
        cells, found = [], {}
        for measure in MEASURES:
            both = [task for task in tasks if task in by_task]
            own = {task: points(by_task[task], measure) for task in both}
            paired = [difference(own[task], points(runs[DEFAULT][task], measure)) for task in both]
            paired = [one for one in paired if one]
            digits = 3 if measure.startswith("nats") else 1
            cell = f"{mean(list(own.values())):.{digits}f}"
            if method != DEFAULT and paired:
                found[measure] = mean(paired), interval(paired)
                low, high = found[measure][1] or (float("nan"), float("nan"))
                cell += f"<br>{found[measure][0]:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
            cells.append(cell)
        made = [record for records in by_task.values() for record in records]
        essay = np.mean([record.neutral_text for record in made])
        size = made[0].training.trainable_parameters if made[0].training else 0
        end = "" if method == DEFAULT else verdict(found, len(made) == total == 9) if found else "runs are missing"
        print(f"| {method} | {size:,} | {len(made)} | {' | '.join(cells)} | {essay:.2f} | {end} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
