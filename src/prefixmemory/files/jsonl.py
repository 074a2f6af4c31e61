"""Files of one JSON object a line that several processes append to, and that survive a kill in the middle of a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.files.json_text import parse_json


def append_line(file: Path, content: object) -> None:
    """Add ``content`` to ``file`` as its last line; it is on the disk when this returns.

    A line that a killed process left unfinished is cut off first.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(content, ensure_ascii=False) + "\n"
    with FileLock(file.with_name(f".{file.name}.lock")), file.open("ab+") as stream:
        stream.seek(0)
        written = stream.read()
        whole = _whole(written)
        stream.truncate(len(whole))
        missing_end = b"" if not whole or whole.endswith(b"\n") else b"\n"
        stream.write(missing_end + line.encode())
        stream.flush()
        os.fsync(stream.fileno())


def read_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """The number and the content of each line, without one that is unfinished; nothing if there is no such file.

    Raises:
        PrefixMemoryError: a line is damaged; the message names file and line.
    """
    written = file.read_bytes() if file.is_file() else b""
    for number, line in enumerate(_whole(written).splitlines(), start=1):
        try:
            content = parse_json(line)
        except ValueError as error:
            raise damaged(file, number, str(error)) from error
        yield number, content


def damaged(file: Path, number: int, problem: str) -> PrefixMemoryError:
    """An error about a line of ``file``."""
    return PrefixMemoryError(f"{file}, line {number} is damaged ({problem}). Delete it; it will be run again.")


def _whole(written: bytes) -> bytes:
    """``written`` without an unfinished last line. One that only lacks its line break, as editors leave it, stays."""
    end = written.rfind(b"\n") + 1
    try:
        parse_json(written[end:])
    except ValueError:
        return written[:end]
    return written
