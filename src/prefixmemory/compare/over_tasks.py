"""From records to figures over tasks: averages, paired differences, robustness to the learning rate, cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from statistics import fmean
from typing import TypeVar

from prefixmemory.compare import intervals
from prefixmemory.compare.account import averaged_tasks
from prefixmemory.compare.by_task import Finals, behind_text, estimate, points_of_tests, transfer_points
from prefixmemory.compare.records import Record
from prefixmemory.compare.runs import seeds_of
from prefixmemory.compare.suite import Loaded
from prefixmemory.compare.summary import (
    Average,
    Cell,
    Cost,
    Difference,
    Estimate,
    Incomplete,
    OnTask,
    RatePoint,
    Robustness,
    Transferred,
)

AnyEstimate = TypeVar("AnyEstimate", bound=Estimate)


def _complete(loaded: Loaded, method: str, finals: Finals) -> bool:
    seeds = len(seeds_of(loaded, loaded.methods[method]))
    return all(len(finals.get((task, method), {})) == seeds for task in loaded.tasks)


def averages(loaded: Loaded, cells: list[Cell], finals: Finals) -> list[Average]:
    """Means over tasks, of the methods that have every task and every seed: others would be flattered or wronged."""
    tasks = averaged_tasks(loaded)
    return [
        _average(loaded, method, [cell for cell in cells if cell.method == method and cell.task in tasks], finals)
        for method in loaded.methods
        if _complete(loaded, method, finals)
    ]


def _average(loaded: Loaded, method: str, own: list[Cell], finals: Finals) -> Average:
    found = {cell.task: finals[cell.task, method] for cell in own}
    whole = estimate([points_of_tests(loaded.tasks[task], by_seed) for task, by_seed in found.items()])
    trained = next(iter(found[own[0].task].values())).training
    return Average(
        mean=fmean(cell.mean for cell in own if cell.mean is not None),
        low=whole.low,
        high=whole.high,
        method=method,
        worst=min(cell.worst for cell in own),
        collapsed=total(cell.collapsed for cell in own),
        runs=sum(len(cell.seeds) for cell in own),
        tasks=len(own),
        long_input=behind_text([(loaded.tasks[task], by_seed) for task, by_seed in found.items()]),
        transfer=_transferred(loaded, own, method, finals),
        neutral_text=mean(cell.neutral_text for cell in own),
        trainable_parameters=trained.trainable_parameters if trained else 0,
    )


def _transferred(loaded: Loaded, own: list[Cell], method: str, finals: Finals) -> Transferred | None:
    """Mean of the scores on other tasks, and of the own scores of the tasks that have others; of those that are scored
    from 0 to 100, unless none is."""
    pairs = [(cell.task, other) for cell in own for other in cell.transfer]
    of_100 = [(task, other) for task, other in pairs if loaded.task(other).scoring != "loss"]
    pairs = of_100 or pairs
    if not pairs:
        return None
    # pairs share the adapters of a task, and the rows of another
    trained, scored = (list(dict.fromkeys(names)) for names in zip(*pairs, strict=True))
    alike = [(trained.index(task), scored.index(other)) for task, other in pairs]
    others = estimate([transfer_points(loaded.task(other), finals[task, method]) for task, other in pairs], alike)
    tests = estimate([points_of_tests(loaded.tasks[task], finals[task, method]) for task in trained])
    return Transferred(**others.parts(), own=tests, pairs=len(pairs))


def incomplete(loaded: Loaded, finals: Finals) -> list[Incomplete]:
    """The methods that have no average."""
    return [
        Incomplete(
            method,
            scored=sum(len(finals.get((task, method), {})) for task in loaded.tasks),
            runs=len(loaded.tasks) * len(seeds_of(loaded, loaded.methods[method])),
        )
        for method in loaded.methods
        if not _complete(loaded, method, finals)
    ]


def differences(loaded: Loaded, finals: Finals) -> list[Difference]:
    """a - b for every ordered pair, by task and on average, over the tasks and seeds that both have, row by row."""
    found = []
    for names in combinations(loaded.methods, 2):
        without_seeds = [loaded.methods[name].kind == "base" for name in names]
        paired = {}
        for name, task in loaded.tasks.items():
            if all((name, method) in finals for method in names):
                a, b = (points_of_tests(task, finals[name, method]) for method in names)
                if difference := intervals.difference(a, b, *without_seeds):
                    paired[name] = difference
        if not paired:
            continue
        tasks = [task for task in averaged_tasks(loaded) if task in paired]
        whole = estimate([paired[task] for task in tasks]) if tasks else Estimate(None, None, None)
        by_task = {task: OnTask(**estimate([one]).parts(), seeds=list(one)) for task, one in paired.items()}
        forth = Difference(**whole.parts(), a=names[0], b=names[1], tasks=tasks, by_task=by_task)
        back = {task: _turned(one) for task, one in by_task.items()}
        found += [forth, replace(_turned(forth), a=names[1], b=names[0], by_task=back)]
    return found


def _turned(one: AnyEstimate) -> AnyEstimate:
    """That of ``b - a``, given that of ``a - b``."""
    mean, low, high = (None if value is None else 0.0 - value for value in (one.mean, one.low, one.high))
    return replace(one, mean=mean, low=high, high=low)


def robustness(loaded: Loaded, curves: list[RatePoint]) -> list[Robustness]:
    """Best and worst of several learning rates, of the methods whose every rate was tested with every seed and task."""
    found = []
    tasks = averaged_tasks(loaded)
    for method in loaded.methods:
        own = [point for point in curves if point.method == method and point.task in tasks]
        if len(own) <= len(tasks) or any(len(point.seeds) < len(loaded.suite.seeds) for point in own):
            continue
        factors = sorted({point.factor for point in own})
        means = [fmean(point.test or 0.0 for point in own if point.factor == factor) for factor in factors]
        by_task = {task: [point.test or 0.0 for point in own if point.task == task] for task in tasks}
        found.append(
            Robustness(
                method=method,
                factors=factors,
                means=means,
                worst_against_best=min(means) - max(means),
                by_task={task: min(tests) - max(tests) for task, tests in by_task.items()},
                below_base=total(point.below_base for point in own),
                runs=sum(len(point.seeds) for point in own),
            )
        )
    return found


def costs(loaded: Loaded, finals: Finals) -> list[Cost]:
    """What each method costs, over all of its final runs at the chosen rates."""
    found = []
    for method in loaded.methods:
        runs = [record for task in loaded.tasks for record in finals.get((task, method), {}).values()]
        trained = [record.training for record in runs if record.training is not None]
        if runs:
            found.append(
                Cost(
                    method=method,
                    runs=len(runs),
                    trainable_parameters=max((one.trainable_parameters for one in trained), default=0),
                    file_bytes=max((one.file_bytes for one in trained), default=0),
                    train_seconds=mean(one.seconds for one in trained),
                    rows_a_second=mean(
                        one.rows * one.settings["epochs"] / one.seconds if one.seconds else None for one in trained
                    ),
                    decoding=mean(map(_writing_speed, runs)),
                    peak_memory_bytes=max((record.peak_memory_bytes or 0 for record in runs), default=0) or None,
                )
            )
    return found


def _writing_speed(record: Record) -> float | None:
    """Relative to the base model in the same run."""
    return record.decoding.tokens_a_second / record.decoding.base if record.decoding and record.decoding.base else None


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known; ``None`` if none is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def total(counts: Iterable[int | None]) -> int | None:
    """The sum; ``None`` if one is not known."""
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)
