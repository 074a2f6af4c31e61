"""A lock that one process at a time holds, that says who does, and that the kernel releases when the holder dies."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from prefixmemory.errors import PrefixMemoryError


class Lock:
    """The lock ``file``, which is there while somebody holds it; who does stands in it.

    Args:
        file: beside what it guards. On network file systems it locks as well as these do: NFS from version 4 on, and
            Lustre where it is mounted with ``flock``, lock between machines.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock = FileLock(file)
        self._times = 0

    @contextmanager
    def held(self, problem: str) -> Iterator[None]:
        """Hold the lock; may be entered again within.

        Args:
            problem: what to say where another process holds it, such as "out belongs to a run that is going on".

        Raises:
            PrefixMemoryError: another process holds it; the message names it.
        """
        made = [folder for folder in self.file.parents if not folder.exists()]
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise PrefixMemoryError(
                f"{problem}: {self._holder()} has it. Wait until that is done, stop it, or give another folder."
            ) from None
        except OSError as error:
            raise PrefixMemoryError(
                f"{self.file.parent} cannot be written: {error.strerror}. Give another folder."
            ) from error
        self._times += 1
        try:
            if self._times == 1:
                with suppress(OSError):  # a full disk: it is locked all the same
                    self.file.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
            yield
        finally:
            self._times -= 1
            if not self._times:
                with suppress(OSError):  # Windows deletes no open file
                    self.file.unlink()  # before the release: whoever opened it meanwhile sees that it is gone
            self._lock.release()
            for folder in made:
                with suppress(OSError):  # something lies there
                    folder.rmdir()

    def _holder(self) -> str:
        try:
            return self.file.read_text(encoding="utf-8") or "another process"
        except (OSError, ValueError):  # it has just begun, or has just ended
            return "another process"
