"""Pipes in the place of files: read to their end, but not forever."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

from prefixmemory.errors import PrefixMemoryError

#: Bytes, and seconds in which a program has to begin to write into a named pipe.
LARGEST, PATIENCE = 2_000_000_000, 10.0
#: Bytes of a text that is read as a whole.
LARGEST_TEXT = 50_000_000


def read_pipe(file: Path) -> bytes:
    """All that comes out of a pipe (``/dev/stdin``, ``<(command)``) or a terminal.

    Raises:
        PrefixMemoryError: it is another device, nobody writes into it, or it does not end.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISFIFO(mode) or os.isatty(descriptor)):
            raise PrefixMemoryError(f"{file} is a device, and no file. Give a file, or a pipe: <(command).")
        # only a pipe with a name can be opened before the program at its other end is there
        named = stat.S_ISFIFO(mode) and os.path.exists(os.path.realpath(file))
        begun = _await_writer(file, descriptor) if named else b""
        os.set_blocking(descriptor, True)
        parts, size = [begun], len(begun)
        while part := os.read(descriptor, 1 << 20):
            parts.append(part)
            size += len(part)
            if size > LARGEST:
                raise PrefixMemoryError(f"{file} does not end: {LARGEST // 10**9} GB came out of it. Give a file.")
        return b"".join(parts)
    finally:
        os.close(descriptor)


def _await_writer(file: Path, descriptor: int) -> bytes:
    """What was read, which may be nothing yet, once a program has opened the other end."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            if begun := os.read(descriptor, 1 << 20):
                return begun
        except BlockingIOError:  # a program is there, and has not written yet
            return b""
        time.sleep(0.05)
    raise PrefixMemoryError(f"{file} is a pipe that nobody writes into. Start the program that does, or give a file.")


def read_text(file: Path) -> str:
    """The UTF-8 text of a file or a pipe.

    Raises:
        OSError, ValueError: it cannot be read, is larger than any text to read, or is no UTF-8.
    """
    if file.is_file() and file.stat().st_size > LARGEST_TEXT:
        raise PrefixMemoryError(f"it is larger than {LARGEST_TEXT // 1_000_000} MB")
    return (file.read_bytes() if file.is_file() else read_pipe(file)).decode()
