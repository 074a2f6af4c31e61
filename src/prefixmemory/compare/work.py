"""Running a suite: any number of workers do what is left to do, each run once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from prefixmemory.compare.records import Record, Run
from prefixmemory.compare.runs import planned, total
from prefixmemory.compare.store import Store
from prefixmemory.compare.suite import Loaded
from prefixmemory.compare.summary import digits_of
from prefixmemory.compare.worker import Worker
from prefixmemory.progress import progress_bar, say
from prefixmemory.training.output import remove_run
from prefixmemory.training.record import checksum


def checksums(loaded: Loaded, data: Path | None) -> dict[str, str]:
    """task -> checksum of its rows, also of the tasks on which adapters of others are scored.

    Reads all rows and splits them, so that what cannot be done is refused before anything runs.
    """
    suite = loaded.suite
    others = [name for task in loaded.tasks.values() for name in task.transfers_to] if suite.transfer_rows else []
    tasks = {name: loaded.task(name) for name in dict.fromkeys([*loaded.tasks, *others])}
    for task in tasks.values():
        task.check_installed()
        task.split(data, suite.validation_rows, suite.test_rows, suite.seeds[0])
    found = {}
    for name, task in tasks.items():
        train, test = task.rows(data, "train"), task.rows(data, "test")
        # a boundary that was moved is another split; records began with tasks of folders, which have none to move
        between = [] if task.folder is not None else [{"split": "test"}]
        found[name] = checksum([*train, *between, *test])
    return found


def state(store: Store) -> tuple[list[Run], dict[Run, Record]]:
    """The runs that are known to be needed, and the records of those that have been made."""
    records: dict[Run, Record] = {}
    while True:
        runs = planned(store.loaded, records)
        found = store.records(runs)
        if found.keys() == records.keys():
            return runs, found
        records = found


def work(store: Store, data: Path | None, console: Console, retry_failed: bool = False) -> None:
    """Do what is left to do, beside other workers; returns when every run has its record.

    Args:
        store: knows the suite, and holds its records.
        data: folder of the tasks' data.
        console: where progress is shown.
        retry_failed: run again what failed before.
    """
    worker = Worker(store, data)
    runs, records = state(store)
    failed = {run: record.attempt for run, record in records.items() if record.failure and retry_failed}
    if failed or any(run not in records for run in runs):
        worker.load(records.values())  # a model that is not there is no matter of one run
    console.print(f"{total(store.loaded)} runs, {len(records)} of them done.", highlight=False)
    with progress_bar(console) as bar:
        task = bar.add_task(store.loaded.suite.name, total=total(store.loaded))
        while True:
            runs, records = state(store)
            bar.update(task, completed=len(records))
            todo = {run: 0 for run in runs if run not in records}
            todo |= {run: made for run, made in failed.items() if run in records and records[run].attempt == made}
            if not todo:
                return
            if not _run_one(store, worker, todo, console):
                time.sleep(2)


def _run_one(store: Store, worker: Worker, todo: Mapping[Run, int], console: Console) -> bool:
    """Do one of ``todo``, run -> attempts that have been made; ``False``: others are at all of them."""
    for run, made in todo.items():
        with store.claim(run) as mine:
            before = store.read(run)
            if not mine or (before.attempt if before else 0) != made:  # another worker is at it, or has just done it
                continue
            started = time.monotonic()
            record = replace(worker.run(run), attempt=made + 1)
            store.write(record)
            digits = digits_of(store.loaded.tasks[run.task].scoring)
            say(console, line(run, record, time.monotonic() - started, digits))
            return True
    return False


def line(run: Run, record: Record, seconds: float, digits: int) -> str:
    """One line about a run that has ended."""
    rate = "" if run.learning_rate is None else f" at {run.learning_rate:g}"
    failure, scores = record.failure, record.scores
    outcome = f"{scores.score:.{digits}f}" if scores else ""
    outcome = f"failed: {failure.type}: {failure.message[:100]}" if failure else outcome
    return f"{run.task}, {run.method}{rate}, seed {run.seed} ({run.stage}): {outcome}, {seconds:.0f} s"


def forget_work(store: Store) -> None:
    """Delete the adapters of a suite that is done, but for those that another suite in the same folder is using."""
    for run in planned(store.loaded, state(store)[1]):
        with store.claim(run) as mine:
            if mine:
                remove_run(store.adapter(run))
