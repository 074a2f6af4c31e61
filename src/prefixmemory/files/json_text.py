"""JSON from elsewhere, read within limits that no honest file meets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from prefixmemory.errors import PrefixMemoryError

#: Objects and arrays within each other; what we write and read has less than ten.
DEEPEST = 64
#: In bytes, of a config or a record; ours have a few thousand.
LARGEST = 10_000_000


_HALF, _HALF_BYTES = re.compile(r"\\u[dD][89a-fA-F]"), re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes) -> Any:
    """What ``text`` says.

    Raises:
        ValueError: it is no JSON, an object has a key twice, it is nested deeper than :data:`DEEPEST`, a number has
            thousands of digits, or a text holds half of a surrogate pair.
    """
    too_deep = ValueError(f"objects or arrays within each other, more than {DEEPEST} deep")
    try:
        content = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise too_deep from None
    if _HALF.search(text) if isinstance(text, str) else _HALF_BYTES.search(text):
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{error.object[error.start]!r} is half of a pair, and no character") from None
    signs = ("{", "[") if isinstance(text, str) else (b"{", b"[")
    if sum(map(text.count, signs)) > DEEPEST and _is_too_deep(content):  # type: ignore[arg-type]
        raise too_deep
    return content


def read_object(file: Path, advice: str) -> dict[str, Any]:
    """The JSON object in ``file``, which exists.

    Args:
        file: a config, or a record of a run.
        advice: what to do about one that cannot be read.

    Raises:
        PrefixMemoryError: it cannot be read, or holds something else.
    """
    if file.stat().st_size > LARGEST:
        raise PrefixMemoryError(f"{file} is larger than {LARGEST // 1_000_000} MB, as no such file is. {advice}")
    try:
        content = parse_json(file.read_bytes())
    except ValueError as error:
        raise PrefixMemoryError(f"{file} is truncated or damaged ({error}). {advice}") from error
    if not isinstance(content, dict):
        raise PrefixMemoryError(f"{file} holds {type(content).__name__}, and no object. {advice}")
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
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(one, dict | list) for one in level)
