"""Names that people give and that become names of files."""

from __future__ import annotations

import re
from pathlib import Path

from prefixmemory.errors import PrefixMemoryError

#: In bytes: several names and more go into one file name, of which no file system takes more than 255.
LONGEST = 80
_NAME = re.compile(r"\w([\w .+=@-]*\w)?")


def exists(path: str | Path) -> bool:
    """Whether there is such a file or folder; what no file system takes for a name is none."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # thousands of characters, or a NUL
        return False


def check_name(field: str, name: str) -> None:
    """Refuse a name that cannot be a part of a file name everywhere, or that leads into another folder.

    Raises:
        PrefixMemoryError: names the field.
    """
    if not _NAME.fullmatch(name) or len(name.encode()) > LONGEST:
        shown = name if len(name) <= LONGEST else f"{name[:LONGEST]}…"
        raise PrefixMemoryError(
            f"{field}={shown!r} cannot be the name of a file: use 1 to {LONGEST} letters, digits and . _ - + = @ or "
            "blanks, a letter or digit first and last."
        )
