"""JSON from elsewhere, read within limits that no honest file meets."""

from __future__ import annotations

import json
from typing import Any

#: Objects and arrays within each other; what we write and read has less than ten.
DEEPEST = 64


def parse_json(text: str | bytes) -> Any:
    """What ``text`` says.

    Raises:
        ValueError: it is no JSON, an object has a key twice, it is nested deeper than :data:`DEEPEST`, or a number has
            thousands of digits.
    """
    too_deep = ValueError(f"objects or arrays within each other, more than {DEEPEST} deep")
    try:
        content = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise too_deep from None
    signs = ("{", "[") if isinstance(text, str) else (b"{", b"[")
    if sum(map(text.count, signs)) > DEEPEST and _is_too_deep(content):  # type: ignore[arg-type]
        raise too_deep
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:80]!r} is given twice")
    return found


def _is_too_deep(content: Any) -> bool:
    level = [content]
    for _ in range(DEEPEST + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)
