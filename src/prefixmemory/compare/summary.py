"""From records to figures: means with intervals, worst seeds, collapsed runs, paired differences; plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np

from prefixmemory.compare import account, intervals
from prefixmemory.compare.intervals import Points
from prefixmemory.compare.method import Method
from prefixmemory.compare.runs import Record, Run, chosen_rate, rates, seeds_of
from prefixmemory.compare.suite import Loaded
from prefixmemory.tasks import Task

Pair = tuple[str, str]  # task, method
Finals = dict[Pair, dict[int, Record]]  # seed -> record of the final run at the chosen rate, where it has a score


def summarise(loaded: Loaded, records: Mapping[Run, Record]) -> dict[str, Any]:
    """What the report shows; it is whole at every stage of a comparison.

    Returns:
        ``conditions``, ``notes`` (what a reader must know about these figures), ``tasks``, ``methods``; ``cells``: one
        entry a task and method (score, interval, seeds, worst, collapsed, long input, transfer, forgetting);
        ``rates``: score by learning rate; ``robustness``: of the methods whose every rate was tested with every seed,
        how far the worst rate is from the best; ``averages``: over tasks, of methods whose every run has a score;
        ``incomplete``: the other methods; ``differences``: of all pairs of methods, paired by task, seed and row;
        ``costs``; ``failed``; ``missing``: runs without a record. Means are over seeds; ``low`` and ``high`` are
        ``None`` where there is no interval.
    """
    finals: Finals = {
        (task.name, method.name): found
        for task in loaded.tasks.values()
        for method in loaded.methods.values()
        if (found := _finals(loaded, task, method, records))
    }
    cells = [_cell(loaded, *pair, finals) for pair in finals]
    pairs = [(task, method) for task in loaded.tasks for method in loaded.methods]
    curves = [point for pair in pairs for point in _curve(loaded, *pair, finals, records)]
    summary = {
        "conditions": account.conditions(loaded, records),
        "notes": account.notes(loaded, cells),
        "tasks": [account.described(loaded, task, cells) for task in loaded.tasks.values()],
        "methods": [{"name": m.name, "kind": m.kind, "description": m.description} for m in loaded.methods.values()],
        "cells": cells,
        "rates": curves,
        "robustness": _robustness(loaded, curves),
        "averages": _averages(loaded, cells, finals),
        "incomplete": _incomplete(loaded, finals),
        "differences": _differences(loaded, finals),
        "costs": _costs(loaded, finals),
        "failed": account.failed(records),
        "missing": account.missing(loaded, records),
    }
    return {name: _without_nan(value) for name, value in summary.items()}


def _without_nan(value: Any) -> Any:
    """The same with ``None`` for what is no number: JSON knows none, and browsers refuse it."""
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def chosen_rate_of(loaded: Loaded, task: Task, method: Method, records: Mapping[Run, Record]) -> float | None:
    """The learning rate of the final runs; ``None`` where nothing is trained, or nothing is chosen yet."""
    if not method.is_trained:
        return None
    candidates = rates(loaded, method)
    return candidates[0] if len(candidates) == 1 else chosen_rate(loaded, task, method, records)


def _finals(loaded: Loaded, task: Task, method: Method, records: Mapping[Run, Record]) -> dict[int, Record]:
    rate = chosen_rate_of(loaded, task, method, records)
    found = {}
    for seed in loaded.suite.seeds:
        run = Run(task.name, method.name, "final", rate, seed)
        if run in records and account.error(run, records[run]) is None:
            found[seed] = records[run]
    return found


# One task and method


def _points(scored: Iterable[tuple[int, Mapping[str, Any]]], scoring: str) -> Points:
    """seed -> points whose mean is the score: those of the rows, or one point where rows have none."""
    return {
        seed: np.array([one["score"]] if scoring in account.OF_ALL_ROWS else one["points"], dtype=np.float64)
        for seed, one in scored
    }


def _tests(loaded: Loaded, pair: Pair, finals: Finals) -> Points:
    return _points(((seed, r["test"]) for seed, r in finals[pair].items()), loaded.tasks[pair[0]].scoring)


def _spread(tasks: Sequence[Points], alike: Sequence[tuple[int, int]] | None = None) -> dict[str, float | None]:
    low, high = intervals.interval(tasks, alike) or (None, None)
    return {"low": low, "high": high}


def _mean_and_spread(tasks: Sequence[Points], alike: Sequence[tuple[int, int]] | None = None) -> dict[str, Any]:
    return {"mean": intervals.mean(tasks), **_spread(tasks, alike)}


def _base_score(loaded: Loaded, task: str, finals: Finals) -> float | None:
    found = [finals[task, m.name] for m in loaded.methods.values() if m.kind == "base" and (task, m.name) in finals]
    return next((float(record["test"]["score"]) for by_seed in found for record in by_seed.values()), None)


def _cell(loaded: Loaded, task: str, method: str, finals: Finals) -> dict[str, Any]:
    found = finals[task, method]
    scores = {seed: float(record["test"]["score"]) for seed, record in found.items()}
    first = next(iter(found.values()))
    base = None if loaded.methods[method].kind == "base" else _base_score(loaded, task, finals)
    extra = set(first["test"]) - {"score", "rows", "points", "answers"}
    return {
        "task": task,
        "method": method,
        "learning_rate": first["learning_rate"],
        "seeds": list(scores),
        "planned_seeds": len(seeds_of(loaded, loaded.methods[method])),
        "scores": list(scores.values()),
        "mean": fmean(scores.values()),
        **_spread([_tests(loaded, (task, method), finals)]),
        "worst": min(scores.values()),
        "collapsed": None if base is None else sum(score < base for score in scores.values()),
        "rows": first["test"]["rows"],
        "metrics": {name: fmean(record["test"][name] for record in found.values()) for name in sorted(extra)},
        "long_input": _long_input([(loaded.tasks[task], found)]),
        "transfer": {
            other: {
                **_mean_and_spread([_behind(loaded.task(other), found, "transfer", other)]),
                "rows": first["transfer"][other]["rows"],
                "unit": account.UNITS[loaded.task(other).scoring],
            }
            for other in _shared(found, "transfer")
        },
        "neutral_text": fmean(record["neutral_text"]["nats_a_token"] for record in found.values()),
    }


def _shared(found: Mapping[int, Record], name: str) -> list[str]:
    """Tokens or tasks for which every seed has a score, in order."""
    return sorted(set.intersection(*(set(record.get(name, {})) for record in found.values())), key=_as_number)


def _as_number(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdigit() else (0, text)


def _behind(task: Task, found: Mapping[int, Record], name: str, key: str) -> Points:
    return _points(((seed, record[name][key]) for seed, record in found.items()), task.scoring)


def _long_input(tasks: list[tuple[Task, dict[int, Record]]]) -> dict[str, Any]:
    """tokens in front -> score, and how it differs from that of the same rows and seeds behind nothing."""
    lengths = [_shared(found, "long_input") for _, found in tasks]
    result = {}
    for length in (length for length in lengths[0] if all(length in other for other in lengths)):
        here, alone = ([_behind(task, found, "long_input", key) for task, found in tasks] for key in (length, "0"))
        changes = [intervals.difference(a, b) for a, b in zip(here, alone, strict=True)]
        rows = [next(iter(found.values()))["long_input"][length]["rows"] for _, found in tasks]
        result[length] = {**_mean_and_spread(here), "change": _mean_and_spread(changes), "rows": max(rows)}
    return result


def _curve(
    loaded: Loaded, task: str, method: str, finals: Finals, records: Mapping[Run, Record]
) -> Iterator[dict[str, Any]]:
    """Score by learning rate: on validation rows for one seed, on test rows for the seeds that have been run."""
    own = loaded.methods[method]
    if not own.is_trained:
        return
    base = _base_score(loaded, task, finals)
    chosen = chosen_rate_of(loaded, loaded.tasks[task], own, records)
    for rate in rates(loaded, own):
        runs = [Run(task, method, "rate", rate, loaded.suite.seeds[0])]
        runs += [Run(task, method, "final", rate, seed, c) for seed in loaded.suite.seeds for c in (True, False)]
        made = [run for run in runs if run in records]
        sound = [run for run in made if account.error(run, records[run]) is None]
        tests = {run.seed: float(records[run]["test"]["score"]) for run in sound if run.stage == "final"}
        tried = [float(records[run]["validation"]["score"]) for run in sound if run.stage == "rate"]
        yield {
            "task": task,
            "method": method,
            "learning_rate": rate,
            "factor": float(f"{rate / (own.learning_rate or 1.0):.2g}"),
            "chosen": rate == chosen,
            "validation": tried[0] if tried else None,
            "seeds": list(tests),
            "tests": list(tests.values()),
            "test": fmean(tests.values()) if tests else None,
            "below_base": None if base is None else sum(score < base for score in tests.values()),
            "failed": len(made) - len(sound),
        }


def _robustness(loaded: Loaded, curves: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Best and worst of several learning rates, of the methods whose every rate was tested with every seed and task."""
    found = []
    tasks = account.averaged_tasks(loaded)
    for method in loaded.methods:
        own = [point for point in curves if point["method"] == method and point["task"] in tasks]
        if len(own) <= len(tasks) or any(len(point["seeds"]) < len(loaded.suite.seeds) for point in own):
            continue
        factors = sorted({point["factor"] for point in own})
        means = [fmean(point["test"] for point in own if point["factor"] == factor) for factor in factors]
        below = [point["below_base"] for point in own]
        by_task = {task: [point["test"] for point in own if point["task"] == task] for task in tasks}
        found.append(
            {
                "method": method,
                "factors": factors,
                "means": means,
                "worst_against_best": min(means) - max(means),
                "by_task": {task: min(tests) - max(tests) for task, tests in by_task.items()},
                "below_base": None if None in below else sum(below),
                "runs": sum(len(point["seeds"]) for point in own),
            }
        )
    return found


# Over tasks


def _complete(loaded: Loaded, method: str, finals: Finals) -> bool:
    seeds = len(seeds_of(loaded, loaded.methods[method]))
    return all(len(finals.get((task, method), {})) == seeds for task in loaded.tasks)


def _averages(loaded: Loaded, cells: list[dict[str, Any]], finals: Finals) -> list[dict[str, Any]]:
    """Means over tasks, of the methods that have every task and every seed: others would be flattered or wronged."""
    found = []
    tasks = account.averaged_tasks(loaded)
    for method in loaded.methods:
        if not _complete(loaded, method, finals):
            continue
        own = [cell for cell in cells if cell["method"] == method and cell["task"] in tasks]
        collapsed = [cell["collapsed"] for cell in own]
        found.append(
            {
                "method": method,
                "mean": fmean(cell["mean"] for cell in own),
                **_spread([_tests(loaded, (task, method), finals) for task in tasks]),
                "worst": min(cell["worst"] for cell in own),
                "collapsed": None if None in collapsed else sum(collapsed),
                "runs": sum(len(cell["seeds"]) for cell in own),
                "tasks": len(own),
                "long_input": _long_input([(loaded.tasks[task], finals[task, method]) for task in tasks]),
                "transfer": _mean_transfer(loaded, own, method, finals),
                "neutral_text": fmean(cell["neutral_text"] for cell in own),
                "trainable_parameters": next(iter(finals[tasks[0], method].values())).get("trainable_parameters", 0),
            }
        )
    return found


def _mean_transfer(loaded: Loaded, own: list[dict[str, Any]], method: str, finals: Finals) -> dict[str, Any] | None:
    """Mean of the scores on other tasks, and of the own scores of the tasks that have others."""
    pairs = [(cell["task"], other) for cell in own for other in cell["transfer"]]
    if not pairs:
        return None
    others = [_behind(loaded.task(other), finals[task, method], "transfer", other) for task, other in pairs]
    tests = [_tests(loaded, (task, method), finals) for task in dict.fromkeys(task for task, _ in pairs)]
    # pairs share the adapters of a task, and the rows of another
    trained, scored = (list(dict.fromkeys(names)) for names in zip(*pairs, strict=True))
    alike = [(trained.index(task), scored.index(other)) for task, other in pairs]
    return {**_mean_and_spread(others, alike), "own": _mean_and_spread(tests), "pairs": len(pairs)}


def _incomplete(loaded: Loaded, finals: Finals) -> list[dict[str, Any]]:
    found = []
    for method in loaded.methods:
        scored = sum(len(finals.get((task, method), {})) for task in loaded.tasks)
        if not _complete(loaded, method, finals):
            runs = len(loaded.tasks) * len(seeds_of(loaded, loaded.methods[method]))
            found.append({"method": method, "scored": scored, "runs": runs})
    return found


def _differences(loaded: Loaded, finals: Finals) -> list[dict[str, Any]]:
    """a - b for every ordered pair, by task and on average, over the tasks and seeds that both have, row by row."""
    found = []
    for names in combinations(loaded.methods, 2):
        without_seeds = [loaded.methods[name].kind == "base" for name in names]
        paired = {}
        for task in loaded.tasks:
            if all((task, name) in finals for name in names):
                a, b = (_tests(loaded, (task, name), finals) for name in names)
                if difference := intervals.difference(a, b, *without_seeds):
                    paired[task] = difference
        if not paired:
            continue
        by_task = {task: _mean_and_spread([one]) | {"seeds": list(one)} for task, one in paired.items()}
        tasks = [task for task in account.averaged_tasks(loaded) if task in paired]
        whole = _mean_and_spread([paired[task] for task in tasks]) if tasks else dict.fromkeys(("mean", "low", "high"))
        forth = {"a": names[0], "b": names[1], **whole, "tasks": tasks, "by_task": by_task}
        back = {"a": names[1], "b": names[0], **_turned(whole), "tasks": tasks}
        found += [forth, {**back, "by_task": {task: _turned(one) for task, one in by_task.items()}}]
    return found


def _turned(difference: Mapping[str, Any]) -> dict[str, Any]:
    """``b - a``, given ``a - b``."""
    mean, low, high = (None if difference[k] is None else 0.0 - difference[k] for k in ("mean", "low", "high"))
    return {**difference, "mean": mean, "low": high, "high": low}


def _costs(loaded: Loaded, finals: Finals) -> list[dict[str, Any]]:
    """What each method costs, over all of its final runs at the chosen rates."""
    found = []
    for method in loaded.methods:
        runs = [record for task in loaded.tasks for record in finals.get((task, method), {}).values()]
        if not runs:
            continue
        found.append(
            {
                "method": method,
                "runs": len(runs),
                "trainable_parameters": max(record.get("trainable_parameters", 0) for record in runs),
                "file_bytes": max(record.get("file_bytes", 0) for record in runs),
                "train_seconds": _mean(record.get("train_seconds") for record in runs),
                "rows_a_second": _mean(_rows_a_second(record) for record in runs),
                "decoding": _mean(_decoding(record) for record in runs),
                "peak_memory_bytes": max((record.get("peak_memory_bytes") or 0 for record in runs), default=0) or None,
            }
        )
    return found


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _rows_a_second(record: Record) -> float | None:
    if not record.get("train_seconds"):
        return None
    return float(record["train_rows"] * record["settings"]["epochs"] / record["train_seconds"])


def _decoding(record: Record) -> float | None:
    """Speed of writing relative to the base model in the same run."""
    speeds = record.get("decoding", {})
    return float(speeds["tokens_a_second"] / speeds["base"]) if speeds.get("base") else None
