"""Records of runs on disk: one JSON file each, named so that people find it, keyed so that nothing is run twice."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prefixmemory.compare.runs import Record, Run, key
from prefixmemory.compare.suite import Loaded
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.files.records import write_json


class Store:
    """The folder of a suite's records.

    Args:
        folder: ``records/`` holds them, ``outputs/`` answers for a judge, ``work/`` locks and adapters.
        loaded: the suite.
        data: task -> checksum of its rows.
    """

    def __init__(self, folder: Path, loaded: Loaded, data: Mapping[str, str]) -> None:
        self.folder, self.loaded, self.data = folder, loaded, data

    @property
    def work(self) -> Path:
        """Locks and adapters: of no use once the suite is done."""
        return self.folder / "work"

    def file(self, run: Run) -> Path:
        """Where the record of ``run`` lies."""
        rate = "" if run.learning_rate is None else f"-{run.learning_rate:g}"
        stem = f"{run.task}-{run.method}-{run.stage}{rate}-{run.seed}-{key(self.loaded, run, self.data)}"
        return self.folder / "records" / f"{stem}.json"

    def outputs(self, run: Run) -> Path:
        """Where the answers of ``run`` lie that are meant for a judge."""
        return self.folder / "outputs" / self.file(run).name

    def adapter(self, run: Run) -> Path:
        """Where the trained weights of ``run`` lie; the runs of both stages share them."""
        as_rate = Run(*run.training[:2], "rate", *run.training[2:])
        return self.work / "adapters" / self.file(as_rate).stem

    def read(self, run: Run) -> Record | None:
        """The record of ``run``, if it has been run.

        Raises:
            PrefixMemoryError: the record is damaged.
        """
        file = self.file(run)
        try:
            found: dict[str, Any] = json.loads(file.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise PrefixMemoryError(f"{file} is damaged ({error}). Delete it; it will be run again.") from error
        return found

    def write(self, run: Run, record: Mapping[str, Any]) -> None:
        """Keep the record of ``run``."""
        write_json(self.file(run), record)

    def records(self, runs: list[Run]) -> dict[Run, Record]:
        """Those of ``runs`` that have a record."""
        found = ((run, self.read(run)) for run in runs)
        return {run: record for run, record in found if record is not None}

    @contextmanager
    def claim(self, run: Run) -> Iterator[bool]:
        """Hold the weights of ``run`` against other workers while it runs; gives ``False`` if one is at it.

        The operating system releases the lock when a worker dies.
        """
        locks = self.work / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{self.adapter(run).name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()
