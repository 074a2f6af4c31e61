"""The folder of a comparison: its records, keyed so that nothing is run twice, and what workers leave beside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from prefixmemory.compare.records import RECORDS, Record, Run, read_records, write_record
from prefixmemory.compare.runs import key
from prefixmemory.compare.suite import Loaded


class Store:
    """The folder of a suite's records.

    Args:
        folder: ``records.jsonl`` holds them, ``outputs/`` answers for a judge, ``work/`` locks and adapters.
        loaded: the suite.
        data: task -> checksum of its rows.
    """

    def __init__(self, folder: Path, loaded: Loaded, data: Mapping[str, str]) -> None:
        self.folder, self.loaded, self.data = folder, loaded, data
        self._read: tuple[object, dict[str, Record]] = (None, {})  # state of the file, and what was in it

    @property
    def file(self) -> Path:
        """Where the records lie, those of other suites in the same folder among them."""
        return self.folder / RECORDS

    @property
    def work(self) -> Path:
        """Locks and adapters: of no use once the suite is done."""
        return self.folder / "work"

    def key(self, run: Run) -> str:
        """What stands for everything that decides the record of ``run``."""
        return key(self.loaded, run, self.data)

    def name(self, run: Run) -> str:
        """A name for the files of ``run``, so that people find them."""
        rate = "" if run.learning_rate is None else f"-{run.learning_rate:g}"
        return f"{run.task}-{run.method}-{run.stage}{rate}-{run.seed}-{self.key(run)}"

    def outputs(self, run: Run) -> Path:
        """Where the answers of ``run`` lie that are meant for a judge."""
        return self.folder / "outputs" / f"{self.name(run)}.json"

    def adapter(self, run: Run) -> Path:
        """Where the trained weights of ``run`` lie; the runs of both stages share them."""
        as_rate = Run(*run.training[:2], "rate", *run.training[2:])
        return self.work / "adapters" / self.name(as_rate)

    def read(self, run: Run) -> Record | None:
        """The record of ``run``, if it has been run.

        Raises:
            PrefixMemoryError: a record is damaged.
        """
        return self._by_key().get(self.key(run))

    def write(self, record: Record) -> None:
        """Keep ``record``."""
        write_record(self.file, record)

    def records(self, runs: list[Run]) -> dict[Run, Record]:
        """Those of ``runs`` that have a record."""
        known = self._by_key()
        return {run: known[name] for run in runs if (name := self.key(run)) in known}

    def _by_key(self) -> dict[str, Record]:
        """All records of the file, read again if it has changed."""
        if not self.file.is_file():
            return {}
        now = self.file.stat()
        if self._read[0] != (state := (now.st_mtime_ns, now.st_size)):
            self._read = state, {record.key: record for record in read_records(self.file)}
        return self._read[1]

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
