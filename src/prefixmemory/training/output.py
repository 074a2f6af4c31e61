"""The folder of a run, which is either absent or complete, whatever happens on the way.

``OUTPUT.partial`` holds the run while it is going on (settings, checkpoints); it becomes ``OUTPUT`` when the adapter
is saved. An earlier ``OUTPUT`` stays until then. One process at a time has them; only what runs write is ever removed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.files.json_text import read_object
from prefixmemory.files.locks import Lock
from prefixmemory.files.records import RECORD, write_json
from prefixmemory.training.card import CARD, is_ours

#: What runs write, by its path in their folder; whatever else lies there is the user's.
_OWN = re.compile(
    "|".join(
        [
            *map(re.escape, (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, RECORD, CARD)),
            r"runs/(.*/)?events\.out\.tfevents[^/]*",  # TensorBoard's
            r"checkpoints/(README\.md|checkpoint-\d+/.*)",  # the Trainer's, and TRL's
            r"saving/.*",
            r"\.[^/]*\.tmp",
        ]
    )
)
#: Fields by which a record is known for ours: others have files called run.json, too.
_FIELDS = {"base_model", "method", "config", "settings", "rows_sha256"}


@dataclass(frozen=True)
class Output:
    """Where a run goes: ``folder`` when it is complete, ``partial`` until then."""

    folder: Path

    @property
    def partial(self) -> Path:
        """The folder of the run in progress."""
        return self.folder.with_name(f"{self.folder.name}.partial")

    @property
    def replaced(self) -> Path:
        """Where the earlier run stands while a new one takes its place."""
        return self.folder.with_name(f"{self.folder.name}.replaced")

    @cached_property
    def _lock(self) -> Lock:
        return Lock(self.folder.with_name(f".{self.folder.name}.lock"))

    @contextmanager
    def held(self, overwrite: bool, resume: bool) -> Iterator[None]:
        """Keep other processes out of the folder while a run goes on in it; may be entered again within.

        Raises:
            PrefixMemoryError: another process holds it, or :meth:`check` refuses it.
        """
        self._check_place()
        with self._lock.held(f"{self.folder} belongs to a run that is going on"):
            self.check(overwrite, resume)
            yield

    def _check_place(self) -> None:
        if not self.folder.name:
            raise PrefixMemoryError(f"{self.folder} names no new folder. Give a folder that does not exist yet.")
        if self.folder.is_symlink() or self.folder.is_mount():
            raise PrefixMemoryError(
                f"{self.folder} is a link or a mount, which no run can replace. Give a folder in it."
            )
        for path in (self.folder, *self.folder.parents):
            if path.exists() and not path.is_dir():
                raise PrefixMemoryError(f"{path} is a file. Give a folder that does not exist yet.")

    def check(self, overwrite: bool, resume: bool) -> None:
        """Refuse to lose anything.

        Raises:
            PrefixMemoryError: the folder holds something and ``overwrite`` is not given, an interrupted run lies there
                and neither is given, or there is nothing to resume.
        """
        if overwrite and resume:
            raise PrefixMemoryError("--overwrite and --resume exclude each other: start afresh, or go on.")
        self._check_place()
        for path in (self.folder, self.partial, self.replaced):
            _check_own(path)
        if _files(self.folder) and not (overwrite or resume):
            raise PrefixMemoryError(
                f"{self.folder} already holds a finished run. Give another folder, or --overwrite to replace it once "
                "the new run is complete."
            )
        if resume and not (self.partial / RECORD).is_file():
            raise PrefixMemoryError(f"There is no interrupted run at {self.partial}. Leave --resume out to start one.")
        if (self.partial / RECORD).exists() and not (resume or overwrite):
            raise PrefixMemoryError(
                f"{self.partial} holds an interrupted run. Give --resume to go on with it, or --overwrite to start "
                "afresh."
            )

    def begin(self, plan: Mapping[str, Any], resume: bool, overwrite: bool = False) -> None:
        """Write down what is going to be run, or check that an interrupted run was the same.

        Raises:
            PrefixMemoryError: resuming with other settings than the interrupted run's.
        """
        if not resume:
            if overwrite:
                remove_run(self.partial)
            try:
                self.partial.mkdir(parents=True, exist_ok=True)
                (self.partial / RECORD).open("x").close()  # of two runs that begin at once, one gets it
            except FileExistsError as error:
                raise PrefixMemoryError(
                    f"Another run has just begun in {self.partial}. Give another folder."
                ) from error
            except OSError as error:
                raise PrefixMemoryError(
                    f"{self.partial} cannot be made: {error.strerror}. Give another folder."
                ) from error
            write_json(self.partial / RECORD, plan)
            return
        if not (self.partial / RECORD).stat().st_size:  # the machine died between making the file and writing it
            raise PrefixMemoryError(f"The run at {self.partial} was stopped before it began. Use --overwrite.")
        before = read_object(self.partial / RECORD, "Start afresh with --overwrite.")
        if found := _difference(before, plan):
            field, was, is_now = found
            raise PrefixMemoryError(
                f"The interrupted run at {self.partial} had {field}={was!r}, now it is {is_now!r}. Resume with the "
                "same values, or start afresh with --overwrite."
            )

    def finish(self) -> None:
        """Put the complete run in its place."""
        if self.folder.exists():
            remove_run(self.replaced)  # left by a process that was killed between the two renames below
            self.folder.replace(self.replaced)
        try:
            self.partial.replace(self.folder)
        except OSError:
            if self.replaced.exists():
                self.replaced.replace(self.folder)
            raise
        # last, so that a run that was stopped on the way here can be resumed
        remove_run(self.folder, within="checkpoints/")
        remove_run(self.replaced)

    def interrupted_message(self, command: str) -> str:
        """What to tell a user whose run was stopped, and who can give ``command`` again."""
        return f"Stopped. The checkpoint is kept in {self.partial}. To go on: {command} --resume"


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> tuple[str, Any, Any] | None:
    """The first field in which two plans differ, by its dotted path, and both values."""
    for name, value in now.items():
        old = before.get(name)
        if old == value:
            continue
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            return _difference(old, value, f"{within}{name}.") or (f"{within}{name}", old, value)
        return f"{within}{name}", old, value
    return None


def remove_run(folder: Path, within: str = "") -> None:
    """Delete what a run wrote into ``folder``, and folders that are empty then; what else lies there stays.

    Args:
        folder: of a run; need not exist.
        within: begin of the paths in it that are meant, such as ``checkpoints/``.
    """
    for path in _files(folder):
        if path.relative_to(folder).as_posix().startswith(within) and _is_own(folder, path):
            path.unlink()
    inner = sorted((path for path in (folder / within).rglob("*") if path.is_dir()), reverse=True)
    for path in (*inner, folder / within):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _check_own(folder: Path) -> None:
    """Refuse a folder that holds what no run wrote, or was edited since."""
    found = _files(folder)
    record = folder / RECORD
    just_begun = folder.suffix == ".partial" and record.is_file() and not record.stat().st_size
    if found and not just_begun and not _is_record(record):
        raise PrefixMemoryError(
            f"{folder} holds files that are no run of prefixmemory. Give a folder that does not exist yet."
        )
    for path in found:
        if not _is_own(folder, path):
            what = "was edited" if path.name == CARD else "no run wrote"
            raise PrefixMemoryError(
                f"{folder} holds {str(path.relative_to(folder))!r}, which {what} and which would be deleted with the "
                "run that lies there. Move it away, or give another folder."
            )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _is_own(folder: Path, path: Path) -> bool:
    """Whether a run wrote the file ``path`` in its ``folder``, and nobody edited it who is likely to."""
    name = path.relative_to(folder).as_posix()
    edited = name == CARD and not is_ours(path.read_text(encoding="utf-8", errors="replace"))
    return _OWN.fullmatch(name) is not None and not path.is_symlink() and not edited


def _is_record(file: Path) -> bool:
    try:
        return read_object(file, "").keys() >= _FIELDS
    except (OSError, PrefixMemoryError):
        return False
