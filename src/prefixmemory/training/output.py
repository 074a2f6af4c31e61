"""The folder of a run, which is either absent or complete, whatever happens on the way.

``OUTPUT.partial`` holds the run while it is going on (settings, checkpoints); it becomes ``OUTPUT`` when the adapter
is saved. An earlier ``OUTPUT`` stays until then.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.files.json_text import read_object
from prefixmemory.files.records import RECORD, write_json
from prefixmemory.training.card import CARD

#: What a finished run's folder holds; whatever else lies there is the user's.
OWN = {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, RECORD, CARD, "runs", "checkpoints"}


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

    def check(self, overwrite: bool, resume: bool) -> None:
        """Refuse to lose anything.

        Raises:
            PrefixMemoryError: the folder holds something and ``overwrite`` is not given, an interrupted run lies there
                and neither is given, or there is nothing to resume.
        """
        if overwrite and resume:
            raise PrefixMemoryError("--overwrite and --resume exclude each other: start afresh, or go on.")
        if not self.folder.name:
            raise PrefixMemoryError(f"{self.folder} names no new folder. Give a folder that does not exist yet.")
        if self.folder.is_symlink() or self.folder.is_mount():
            raise PrefixMemoryError(
                f"{self.folder} is a link or a mount, which no run can replace. Give a folder in it."
            )
        for path in (self.folder, *self.folder.parents):
            if path.exists() and not path.is_dir():
                raise PrefixMemoryError(f"{path} is a file. Give a folder that does not exist yet.")
        if self.folder.is_dir() and any(self.folder.iterdir()):
            if not (self.folder / RECORD).is_file():
                raise PrefixMemoryError(
                    f"{self.folder} holds files that are no run of prefixmemory. Give a folder that does not exist yet."
                )
            foreign = sorted(path.name for path in self.folder.iterdir() if path.name not in OWN)
            if foreign:
                raise PrefixMemoryError(
                    f"{self.folder} holds {foreign[0]!r}, which no run wrote and which would be deleted with the "
                    "earlier run. Move it away, or give another folder."
                )
            if not (overwrite or resume):
                raise PrefixMemoryError(
                    f"{self.folder} already holds a finished run. Give another folder, or --overwrite to replace it "
                    "once the new run is complete."
                )
        for path in (self.partial, self.replaced):
            # the Trainer makes an empty folder for checkpoints before anything is written down
            if not (path / RECORD).is_file() and any(not found.is_dir() for found in path.rglob("*")):
                raise PrefixMemoryError(f"{path} holds files that are no run of prefixmemory. Give another folder.")
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
            if overwrite and self.partial.exists():
                shutil.rmtree(self.partial)
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
        for field, value in plan.items():
            if before.get(field) != value:
                raise PrefixMemoryError(
                    f"The interrupted run at {self.partial} had {field}={before.get(field)!r}, now it is {value!r}. "
                    "Resume with the same values, or start afresh with --overwrite."
                )

    def finish(self) -> None:
        """Put the complete run in its place."""
        if self.folder.exists():
            if self.replaced.exists():  # left by a process that was killed between the two renames below
                shutil.rmtree(self.replaced)
            self.folder.replace(self.replaced)
        try:
            self.partial.replace(self.folder)
        except OSError:
            if self.replaced.exists():
                self.replaced.replace(self.folder)
            raise
        # last, so that a run that was stopped on the way here can be resumed
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        shutil.rmtree(self.replaced, ignore_errors=True)

    def interrupted_message(self, command: str) -> str:
        """What to tell a user whose run was stopped, and who can give ``command`` again."""
        return f"Stopped. The checkpoint is kept in {self.partial}. To go on: {command} --resume"
