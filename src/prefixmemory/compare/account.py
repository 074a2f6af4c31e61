"""What a comparison was made with, what is missing in it, and what a reader must know before comparing its figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefixmemory.compare.records import Record, Run
from prefixmemory.compare.runs import chosen_rate, rates, seeds_of
from prefixmemory.compare.suite import WARMUP, Loaded
from prefixmemory.compare.summary import Cell, FailedRun, MissingRuns, TaskInfo
from prefixmemory.tasks import Task

#: What a score is counted in; all but the loss are on a scale from 0 to 100, and are averaged over tasks.
UNITS = {
    "exact_match": "exact match, %",
    "number": "right results, %",
    "reading": "F1, %",
    "text": "BLEU",
    "loss": "log-likelihood, nats a token",
    "preference": "preferred pairs, %",
}
#: Scorings whose score belongs to all rows together and is no mean over rows; ``points`` say something else there.
OF_ALL_ROWS = ("text", "loss")


def averaged_tasks(loaded: Loaded) -> list[str]:
    """Tasks that an average is over: those scored from 0 to 100, or all if none is."""
    of_100 = [task.name for task in loaded.tasks.values() if task.scoring != "loss"]
    return of_100 or list(loaded.tasks)


def failed(records: Mapping[Run, Record]) -> list[FailedRun]:
    """The runs that failed, and why."""
    return [
        FailedRun(run.task, run.method, run.stage, run.seed, run.learning_rate, failure.type, failure.message)
        for run, record in records.items()
        if (failure := record.failure)
    ]


def missing(loaded: Loaded, records: Mapping[Run, Record]) -> list[MissingRuns]:
    """Runs of the suite without a record, counted by task and method."""
    found = []
    for name, task in loaded.tasks.items():
        for method in loaded.methods.values():
            candidates = rates(loaded, method) if method.is_trained else []
            tries = [Run(name, method.name, "rate", rate, loaded.suite.seeds[0]) for rate in candidates]
            tries = tries if len(tries) > 1 else []
            scored = len(candidates) if method.name in loaded.suite.every_rate and candidates else 1
            wanted = len(tries) + scored * len(seeds_of(loaded, method))
            absent = wanted - sum((run.task, run.method) == (name, method.name) for run in records)
            if absent:
                hopeless = all(run in records for run in tries) and chosen_rate(loaded, task, method, records) is None
                why = "not run: every learning rate failed" if tries and hopeless else "not run yet"
                found.append(MissingRuns(name, method.name, absent, why))
    return found


def described(loaded: Loaded, task: Task, cells: list[Cell]) -> TaskInfo:
    """A task for the report; ``rows``: of its test, ``None`` where nothing has been scored."""
    rows = min((cell.rows for cell in cells if cell.task == task.name), default=None)
    said = task.name, task.version, task.description, task.licence, task.scoring, UNITS[task.scoring]
    return TaskInfo(*said, rows=rows, averaged=task.name in averaged_tasks(loaded))


def notes(loaded: Loaded, cells: list[Cell], records: Mapping[Run, Record]) -> list[str]:
    """What a reader must know before comparing these figures, as far as it applies to them."""
    found = []
    tasks = loaded.tasks.values()
    if left_out := [task.name for task in tasks if task.name not in averaged_tasks(loaded)]:
        found.append(f"Averages leave out {', '.join(left_out)}: nats and percent do not add up.")
    if whole := [task.name for task in tasks if task.scoring in OF_ALL_ROWS]:
        found.append(f"Intervals of {', '.join(whole)} are over seeds alone: the score belongs to all rows together.")
    trained_once = {c.method for c in cells if len(c.seeds) == 1 and loaded.methods[c.method].kind != "base"}
    if trained_once:
        found.append(f"Of {', '.join(sorted(trained_once))} there is one seed for some task: those intervals are over "
                     "rows alone, and do not tell how another seed would do.")  # fmt: skip
    if at_the_end := _at_the_end(loaded, cells):
        found.append("Best rate at the end of its grid: move it. The chosen learning rate is the lowest or the "
                     f"highest candidate for {at_the_end}: a better one may lie beyond, which wrongs those methods."
                     )  # fmt: skip
    if fewer := _fewer_for_validation(loaded, records):
        found.append(f"Learning rates were chosen by fewer validation rows, for training needs the others: {fewer}.")
    if unanswered := _unanswered(loaded, cells):
        found.append(f"The base model gets nothing right on {unanswered}: \"below the untrained model\" means below "
                     "the model with examples in its prompt there, and stays empty without it.")  # fmt: skip
    for kind, named in (("task", loaded.tasks), ("method", loaded.methods)):
        own = {name: one.training for name, one in named.items() if one.training}
        if own:
            said = "; ".join(f"{name}: {_training(training)}" for name, training in own.items())
            found.append(f"Training settings that a {kind} has of its own: {said}.")
    if 1 < len(loaded.suite.seeds) < 6:
        found.append(f"{len(loaded.suite.seeds)} seeds say little about the spread of seeds: where seeds differ more "
                     "than rows do, intervals are too narrow. Read the worst seed with them.")  # fmt: skip
    if any(cell.low is not None and cell.low == cell.high for cell in cells):
        found.append("An interval without width belongs to runs whose points are all the same; it does not mean that "
                     "nothing could differ.")  # fmt: skip
    if any(task.scoring == "preference" and task.settings().objective != "simpo" for task in tasks):
        found.append("On preference tasks with dpo or kto, adapters are scored by the reward that the objective "
                     "defines, models without an adapter by likelihood: differences between the two compare two "
                     "measures.")  # fmt: skip
    return found


def _at_the_end(loaded: Loaded, cells: list[Cell]) -> str:
    found: dict[str, list[str]] = {}
    for cell in cells:
        method = loaded.methods[cell.method]
        candidates = rates(loaded, method) if method.is_trained else []
        if len(candidates) > 1 and cell.learning_rate in (candidates[0], candidates[-1]):
            found.setdefault(method.name, []).append(cell.task)
    return ", ".join(f"{method} ({', '.join(tasks)})" for method, tasks in found.items())


def _fewer_for_validation(loaded: Loaded, records: Mapping[Run, Record]) -> str:
    found = {run.task: record.validation.rows for run, record in records.items() if record.validation is not None}
    wanted = loaded.suite.validation_rows
    return ", ".join(f"{task} ({found[task]} of {wanted})" for task in loaded.tasks if found.get(task, wanted) < wanted)


def _unanswered(loaded: Loaded, cells: list[Cell]) -> str:
    return ", ".join(cell.task for cell in cells if loaded.methods[cell.method].kind == "base" and cell.mean == 0)


def _training(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def conditions(loaded: Loaded, records: Mapping[Run, Record]) -> dict[str, Any]:
    """What all runs have in common, and what they were made with."""
    suite = loaded.suite
    versions: dict[str, set[str]] = {}
    for record in records.values():
        for package, version in record.made_with.versions.items():
            versions.setdefault(package, set()).add(version)
    return {
        "suite": suite.name,
        "description": suite.description,
        "base model": suite.model,
        "base weights": sorted({record.base_weights or "not recorded" for record in records.values()}),
        "seeds": suite.seeds,
        "learning rates": "1 a method, its own"
        if len(suite.rate_factors) == 1
        else f"{len(suite.rate_factors)} a method, by {suite.validation_rows} validation rows, one seed",
        "test rows": suite.test_rows,
        "rows behind long inputs": suite.long_input_rows,
        "rows of other tasks": suite.transfer_rows,
        "dtype": suite.dtype,
        "training": _training({"warmup": WARMUP, **suite.training}),
        "commits": sorted({str(record.made_with.commit) for record in records.values()}),
        "hardware": sorted({str(record.made_with.hardware) for record in records.values()}),
        "versions": {package: ", ".join(sorted(found)) for package, found in versions.items()},
        "records": len(records),
    }
