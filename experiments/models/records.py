"""The records of the walk: one JSON file a kind, one line a type, so that a rerun changes only its own lines."""

from __future__ import annotations

import json
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prefixmemory.files.records import provenance

FOLDER = Path(__file__).parent.parent.parent / "results" / "models"
PACKAGES = ("torch", "transformers", "peft")


def _file(kind: str) -> Path:
    return FOLDER / f"{kind}.json"


def read(kind: str) -> dict[str, dict[str, Any]]:
    """Records of a kind by type."""
    file = _file(kind)
    return {r["type"]: r for r in json.loads(file.read_text(encoding="utf-8"))} if file.exists() else {}


def has(kind: str, model_type: str, method: str) -> bool:
    record = read(kind).get(model_type, {})
    return bool(record.get("not_run")) or method in record.get("methods", {})


def put(kind: str, model_type: str, method: str, result: dict[str, Any]) -> None:
    """Write what was measured of one method on one type; what other methods did stays if the versions are the same."""
    known = read(kind)
    record = known.get(model_type, {})
    if record.get("versions") != versions():
        record = {}
    methods = {**record.get("methods", {}), **({method: result["outcome"]} if "outcome" in result else {})}
    record = {
        "type": model_type,
        "date": date.today().isoformat(),
        "commit": _commit(),
        "versions": versions(),
        **({"not_run": result["not_run"]} if "not_run" in result else {}),
        "base": result.get("base") or record.get("base"),
        "methods": methods,
    }
    known[model_type] = record
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(known[name], ensure_ascii=False) for name in sorted(known))
    temporary = _file(kind).with_suffix(".tmp")
    temporary.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    temporary.replace(_file(kind))


@cache
def _commit() -> str | None:
    commit = provenance()["commit"]
    return commit and commit[:7] + ("-dirty" if commit.endswith("-dirty") else "")


@cache
def versions() -> dict[str, str]:
    return {name: version(name).partition("+")[0] for name in PACKAGES}
