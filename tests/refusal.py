"""Packages that are installed here, as if they were not."""

from __future__ import annotations

import builtins
from typing import Any


def refuse(*packages: str) -> None:
    """Refuse them to modules of this project for the rest of the process; others import what they require."""
    plain = builtins.__import__

    def guarded(
        name: str, globals: dict[str, Any] | None = None, locals: Any = None, fromlist: Any = (), level: int = 0
    ) -> object:
        importer = (globals or {}).get("__name__", "")
        if level == 0 and name.partition(".")[0] in packages and importer.startswith("prefixmemory"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return plain(name, globals, locals, fromlist, level)

    builtins.__import__ = guarded
