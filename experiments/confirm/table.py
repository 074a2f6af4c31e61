"""The tables of issue 13's confirmation, from its records: what ``confirm.yaml`` says beforehand, and the same without
collapsed runs.

    python experiments/confirm/table.py results/compare/confirm/records.jsonl > results/compare/confirm/table.md

Runs at the chosen rates; all differences are paired by task, seed and row, over the tasks and seeds that both have.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from prefixmemory.compare.intervals import Points, difference, interval, mean
from prefixmemory.compare.records import Record, Scores, read_records

MEMORY, LORA, SHOTS = "memory", "lora-all-linear", "in-context"
LENGTHS = ("0", "300", "1200", "3000")
ByTask = dict[str, dict[int, Record]]


def greedy(scores: Scores) -> np.ndarray:
    """Whether greedy decoding writes the right answer, in percent, for each row."""
    return 100.0 * np.array(scores.greedy, dtype=float)


#: Measure -> its value for each row of a record.
MEASURES: dict[str, Callable[[Record], np.ndarray]] = {
    "match, 300 rows alone": lambda record: greedy(record.test),
    "match, 100 rows alone": lambda record: greedy(record.long_input["0"]),
    **{f"behind {n} tokens": lambda record, n=n: greedy(record.long_input[n]) for n in LENGTHS[1:]},
    "nats a token, alone": lambda record: -np.array(record.test.points),
    "nats, behind 3000": lambda record: -np.array(record.long_input["3000"].points),
}


def chosen(made: list[Record]) -> dict[tuple[str, str], float | None]:
    """The best rate of each method and task by its validation rows, of all suites in the folder."""
    tried: dict[tuple[str, str], list[Record]] = {}
    for one in made:
        if one.validation is not None:
            tried.setdefault((one.run.method, one.run.task), []).append(one)
    return {key: max(found, key=lambda one: one.validation.score).run.learning_rate for key, found in tried.items()}


def points(by_seed: dict[int, Record], measure: str) -> Points:
    """seed -> value of each row."""
    return {seed: MEASURES[measure](record) for seed, record in sorted(by_seed.items())}


def paired(a: ByTask, b: ByTask, measure: str) -> list[Points]:
    """a - b for each task that both have."""
    found = [difference(points(a[task], measure), points(b[task], measure)) for task in a if task in b]
    return [one for one in found if one]


def with_interval(found: list[Points], digits: int) -> str:
    """The mean and its 95 % interval."""
    low, high = interval(found) or (float("nan"), float("nan"))
    return f"{mean(found):+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def against_lora(runs: dict[str, ByTask]) -> None:
    """What decides, and the same for further methods of the folder."""
    print(f"| method | parameters | runs | {' | '.join(MEASURES)} | essay, nats | worst run, match |")
    print(f"|{'---|' * (len(MEASURES) + 5)}")
    for method, by_task in runs.items():
        made = [record for by_seed in by_task.values() for record in by_seed.values()]
        cells = []
        for measure in MEASURES:
            digits = 3 if measure.startswith("nats") else 1
            cell = f"{mean([points(by_seed, measure) for by_seed in by_task.values()]):.{digits}f}"
            if method != LORA and LORA in runs and made[0].training is not None:
                cell += f"<br>{with_interval(paired(by_task, runs[LORA], measure), digits)}"
            cells.append(cell)
        size = f"{made[0].training.trainable_parameters:,}" if made[0].training else ""
        essay = np.mean([record.neutral_text for record in made])
        worst = min(greedy(record.test).mean() for record in made)
        print(f"| {method} | {size} | {len(made)} | {' | '.join(cells)} | {essay:.2f} | {worst:.1f} |")


def against_others(runs: dict[str, ByTask]) -> None:
    """Memory minus each further method, on the tasks and seeds that both have."""
    trained = [m for m, by_task in runs.items() if any(one.training for one in next(iter(by_task.values())).values())]
    others = [method for method in trained if method not in (MEMORY, LORA)]
    if not others:
        return
    first = next(iter(MEASURES))
    print(f"\n| memory - method | tasks x seeds | memory on these, {first} | {' | '.join(MEASURES)} |")
    print(f"|{'---|' * (len(MEASURES) + 3)}")
    for method in others:
        ours = {
            task: {seed: by_seed[seed] for seed in by_seed.keys() & runs[method][task].keys()}
            for task, by_seed in runs[MEMORY].items()
        }
        shared, level = sum(map(len, ours.values())), mean([points(by_seed, first) for by_seed in ours.values()])
        cells = [
            with_interval(paired(runs[MEMORY], runs[method], measure), 3 if measure.startswith("nats") else 1)
            for measure in MEASURES
        ]
        print(f"| {method} | {shared} | {level:.1f} | {' | '.join(cells)} |")


def by_task(runs: dict[str, ByTask]) -> None:
    """The difference for each task alone."""
    print("\n| task | memory - LoRA, alone | behind 300 | behind 1,200 | behind 3,000 |\n|---|---|---|---|---|")
    names = ["match, 300 rows alone", *(f"behind {n} tokens" for n in LENGTHS[1:])]
    for task in runs[MEMORY]:
        both = [paired({task: runs[MEMORY][task]}, {task: runs[LORA].get(task, {})}, name) for name in names]
        if all(both):
            print(f"| {task} | {' | '.join(with_interval(one, 1) for one in both)} |")


def without_collapses(runs: dict[str, ByTask]) -> None:
    """Means over tasks without the pairs of runs of which one matches next to nothing."""
    pairs = [(task, seed) for task, by_seed in runs[MEMORY].items() for seed in by_seed if seed in runs[LORA][task]]
    lost = [
        (task, seed)
        for task, seed in pairs
        if min(greedy(runs[method][task][seed].test).mean() for method in (MEMORY, LORA)) < 1
    ]
    print(f"\nWithout the pairs of runs of which one is below 1 % ({', '.join(f'{t}, seed {s}' for t, s in lost)}):\n")
    names = [name for name in MEASURES if "nats" not in name]
    print(f"| method | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for method in (MEMORY, LORA):
        kept: ByTask = {}
        for task, seed in pairs:
            if (task, seed) not in lost:
                kept.setdefault(task, {})[seed] = runs[method][task][seed]
        means = (mean([points(by_seed, name) for by_seed in kept.values()]) for name in names)
        print(f"| {method} | {' | '.join(f'{value:.1f}' for value in means)} |")


def rates(all_runs: list[Record], shots: ByTask) -> None:
    """Every rate, over the tasks and seeds that were run at all of them; runs below the k-shot base model."""
    print(
        "\n| method | rate | tasks x seeds | match, alone | worst run | runs below one example a label in the prompt |"
    )
    print("|---|---|---|---|---|---|")
    k_shot = {task: np.mean([greedy(one.test).mean() for one in by_seed.values()]) for task, by_seed in shots.items()}
    for method in (MEMORY, LORA):
        reached: dict[float, dict[tuple[str, int], float]] = {}
        for record in all_runs:
            if record.run.method == method:
                place = record.run.task, record.run.seed
                reached.setdefault(record.run.learning_rate, {})[place] = greedy(record.test).mean()
        common = set.intersection(*map(set, reached.values()))
        for rate, scores in sorted(reached.items()):
            found = {place: scores[place] for place in sorted(common)}
            known = [place for place in found if place[0] in k_shot]
            below = sum(found[place] < k_shot[place[0]] for place in known)
            said = f"{below} of {len(known)}" if known else "not run"
            average, worst = np.mean(list(found.values())), min(found.values())
            print(f"| {method} | {rate:g} | {len(found)} | {average:.1f} | {worst:.1f} | {said} |")


def tries(made: list[Record]) -> None:
    """What the validation rows say of every rate: they alone choose it."""
    print("\n| method | rate | tasks | match, validation rows of seed 0 | chosen on |\n|---|---|---|---|---|")
    best = chosen(made)
    reached: dict[tuple[str, float], list[Record]] = {}
    for one in made:
        if one.validation is not None:
            reached.setdefault((one.run.method, one.run.learning_rate), []).append(one)
    for (method, rate), found in sorted(reached.items()):
        match = np.mean([greedy(one.validation).mean() for one in found])
        taken = sum(best[method, one.run.task] == rate for one in found)
        print(f"| {method} | {rate:g} | {len(found)} | {match:.1f} | {taken} |")


def main(file: Path) -> None:
    """Print the tables."""
    runs: dict[str, ByTask] = {}
    made = [one for one in read_records(file) if one.failure is None]
    finals, best = [one for one in made if one.run.stage == "final"], chosen(made)
    for record in finals:
        if record.run.chosen and record.run.learning_rate == best.get((record.run.method, record.run.task)):
            runs.setdefault(record.run.method, {}).setdefault(record.run.task, {})[record.run.seed] = record
    print(
        "Issue 13's confirmation at the chosen rates. Means over tasks; below them the difference to LoRA on all linear"
    )
    print("layers, paired by task, seed and row, with its 95 % interval.\n")
    tasks = {record.run.task for record in finals}
    for method in [method for method, by_task in runs.items() if by_task.keys() != tasks]:
        print(f"Left out, not yet run on all tasks: {method}.\n")
        del runs[method]
    against_lora(runs)
    if MEMORY in runs and LORA in runs:
        against_others(runs)
        by_task(runs)
        without_collapses(runs)
    rates(finals, runs.get(SHOTS, {}))
    tries(made)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
