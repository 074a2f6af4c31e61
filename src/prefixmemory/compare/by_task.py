"""From records to figures of one task and method: score, worst seed, collapsed runs, long inputs, learning rates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean

import numpy as np

from prefixmemory.compare import intervals
from prefixmemory.compare.account import OF_ALL_ROWS, UNITS
from prefixmemory.compare.intervals import Points
from prefixmemory.compare.method import Method
from prefixmemory.compare.records import Record, Run, Scores
from prefixmemory.compare.runs import chosen_rate, rates, seeds_of
from prefixmemory.compare.suite import Loaded
from prefixmemory.compare.summary import Behind, Cell, Elsewhere, Estimate, RatePoint
from prefixmemory.tasks import Task

Pair = tuple[str, str]  # task, method
BySeed = dict[int, Record]  # seed -> record of the final run at the chosen rate, where it has a score
Finals = dict[Pair, BySeed]


def finals_of(loaded: Loaded, records: Mapping[Run, Record]) -> Finals:
    """The final runs at the chosen rates that have a score."""
    return {
        (task.name, method.name): found
        for task in loaded.tasks.values()
        for method in loaded.methods.values()
        if (found := _finals(loaded, task, method, records))
    }


def _finals(loaded: Loaded, task: Task, method: Method, records: Mapping[Run, Record]) -> BySeed:
    rate = _final_rate(loaded, task, method, records)
    runs = {seed: Run(task.name, method.name, "final", rate, seed) for seed in loaded.suite.seeds}
    return {seed: records[run] for seed, run in runs.items() if run in records and records[run].failure is None}


def _final_rate(loaded: Loaded, task: Task, method: Method, records: Mapping[Run, Record]) -> float | None:
    """The learning rate of the final runs; ``None`` where nothing is trained, or nothing is chosen yet."""
    if not method.is_trained:
        return None
    candidates = rates(loaded, method)
    return candidates[0] if len(candidates) == 1 else chosen_rate(loaded, task, method, records)


def tested(record: Record) -> Scores:
    """The scores of a final run that has some, as all in :data:`Finals` have."""
    assert record.test is not None
    return record.test


# Points and estimates


def points_of(task: Task, scored: Iterable[tuple[int, Scores]]) -> Points:
    """seed -> points whose mean is the score: those of the rows, or one point where rows have none."""
    return {
        seed: np.array([one.score] if task.scoring in OF_ALL_ROWS else one.points, dtype=np.float64)
        for seed, one in scored
    }


def points_of_tests(task: Task, found: BySeed) -> Points:
    """seed -> points of the test."""
    return points_of(task, ((seed, tested(record)) for seed, record in found.items()))


def transfer_points(other: Task, found: BySeed) -> Points:
    """seed -> points on another task."""
    return points_of(other, ((seed, record.transfer[other.name]) for seed, record in found.items()))


def estimate(tasks: Sequence[Points], alike: Sequence[tuple[int, int]] | None = None) -> Estimate:
    """Mean and interval over tasks, seeds and rows; ``alike`` as for :func:`intervals.interval`."""
    low, high = intervals.interval(tasks, alike) or (None, None)
    return Estimate(intervals.mean(tasks), low, high)


# Cells


def untrained(loaded: Loaded, task: str, finals: Finals) -> float | None:
    """What a trained run should not fall below: the base model's score, or where that is 0, that with examples.

    ``None`` where neither was run, or neither gets anything right: nothing can be below 0.
    """
    for kind in ("base", "in_context"):
        for method in loaded.methods.values():
            if method.kind == kind and (found := finals.get((task, method.name))):
                score = fmean(tested(record).score for record in found.values())
                if score:
                    return score
    return None


def cell(loaded: Loaded, pair: Pair, finals: Finals) -> Cell:
    """The figures of one task and method."""
    task, method, found = loaded.tasks[pair[0]], loaded.methods[pair[1]], finals[pair]
    scores = {seed: tested(record).score for seed, record in found.items()}
    first = next(iter(found.values()))
    floor = untrained(loaded, task.name, finals) if method.is_trained else None
    essay = [record.neutral_text for record in found.values() if record.neutral_text is not None]
    return Cell(
        **estimate([points_of_tests(task, found)]).parts() | {"mean": fmean(scores.values())},
        task=task.name,
        method=method.name,
        learning_rate=first.run.learning_rate,
        seeds=list(scores),
        planned_seeds=len(seeds_of(loaded, method)),
        scores=list(scores.values()),
        worst=min(scores.values()),
        collapsed=None if floor is None else sum(score < floor for score in scores.values()),
        rows=tested(first).rows,
        metrics={
            name: fmean(tested(record).metrics[name] for record in found.values())
            for name in sorted(tested(first).metrics)
        },
        long_input=behind_text([(task, found)]),
        transfer={
            other: Elsewhere(
                **estimate([transfer_points(loaded.task(other), found)]).parts(),
                rows=first.transfer[other].rows,
                unit=UNITS[loaded.task(other).scoring],
            )
            for other in sorted(set.intersection(*(set(record.transfer) for record in found.values())))
        },
        neutral_text=fmean(essay) if essay else None,
    )


def behind_text(tasks: list[tuple[Task, BySeed]]) -> dict[str, Behind]:
    """tokens before the rows -> score, and how it differs from that of the same rows and seeds behind nothing."""
    measured = [set(record.long_input) for _, found in tasks for record in found.values()]
    result = {}
    for length in sorted(set.intersection(*measured), key=int):
        here, alone = (
            [points_of(task, ((seed, r.long_input[n]) for seed, r in found.items())) for task, found in tasks]
            for n in (length, "0")
        )
        change = estimate([intervals.difference(a, b) for a, b in zip(here, alone, strict=True)])
        rows = max(record.long_input[length].rows for _, found in tasks for record in found.values())
        result[length] = Behind(**estimate(here).parts(), change=change, rows=rows)
    return result


# Learning rates


def curve(loaded: Loaded, pair: Pair, finals: Finals, records: Mapping[Run, Record]) -> Iterator[RatePoint]:
    """Score by learning rate: on validation rows for one seed, on test rows for the seeds that have been run."""
    task, method = loaded.tasks[pair[0]], loaded.methods[pair[1]]
    if not method.is_trained:
        return
    floor = untrained(loaded, task.name, finals)
    chosen = _final_rate(loaded, task, method, records)
    seeds = loaded.suite.seeds
    for rate in rates(loaded, method):
        runs = [Run(task.name, method.name, "rate", rate, seeds[0])]
        runs += [Run(task.name, method.name, "final", rate, seed, chosen) for seed in seeds for chosen in (True, False)]
        made = [records[run] for run in runs if run in records]
        sound = [record for record in made if record.failure is None]
        tests = {record.run.seed: record.test.score for record in sound if record.test is not None}
        tried = [record.validation.score for record in sound if record.validation is not None]
        yield RatePoint(
            task=task.name,
            method=method.name,
            learning_rate=rate,
            factor=float(f"{rate / (method.learning_rate or 1.0):.2g}"),
            chosen=rate == chosen,
            validation=tried[0] if tried else None,
            seeds=list(tests),
            tests=list(tests.values()),
            test=fmean(tests.values()) if tests else None,
            below_base=None if floor is None else sum(score < floor for score in tests.values()),
            failed=len(made) - len(sound),
        )
