"""Saved memories under the hash of their contents, copied, so that what a request was given cannot change under it.

A server is told of adapters by name and path, but weights may be replaced under both at any moment. Whoever first asks
for what lies at a path has it copied, checked, and numbered by its contents; from there on everything goes by that
number: slots, caches of keys and values, requests in flight.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.files.json_text import read_object
from prefixmemory.memories.peft_type import PREFIX_MEMORY
from prefixmemory.serving.served import read_config

#: Names, to a server, the folders within which adapters must lie, separated as in PATH.
FOLDERS = "PREFIXMEMORY_ADAPTER_FOLDERS"
#: Names, to a server of several machines, a folder that all of them see.
COPIES = "PREFIXMEMORY_COPIES"
#: A name that is none of a module: vLLM wraps no LoRA around anything where it is told to wrap this.
NO_LORA = "attn"
#: Numbers are positive 32-bit integers, and those below are left to other adapters, which are counted from 1 on.
_FIRST, _LAST = 1 << 20, (1 << 31) - 1


@dataclass(frozen=True)
class Held:
    """One memory of the store.

    Attributes:
        content: hash of its weights and config.
        number: made of it; no other memory of the store has it.
        folder: the copy.
    """

    content: str
    number: int
    folder: Path


def is_memory(folder: Path) -> bool:
    """Whether ``folder`` holds a memory, rather than another adapter or nothing."""
    file = folder / CONFIG_NAME
    if not file.is_file():
        return False
    try:
        return bool(read_object(file, "").get("peft_type") == PREFIX_MEMORY.value)
    except PrefixMemoryError:
        return False  # whoever loads it says what is wrong


class Store:
    """Copies of memories, in a folder of the process that is gone when it ends.

    Args:
        check: refuses a folder that cannot be served, by raising.
        within: where to make that folder; ``None``: where temporary files go.
        allowed: folders within which adapters must lie; ``None``: anywhere.
    """

    def __init__(
        self, check: Callable[[Path], None], within: Path | None = None, allowed: list[Path] | None = None
    ) -> None:
        self._check = check
        self._copies = Path(tempfile.mkdtemp(prefix="prefixmemory-serving-", dir=within))
        weakref.finalize(self, shutil.rmtree, self._copies, ignore_errors=True)
        self._allowed = None if allowed is None else [folder.resolve() for folder in allowed]
        self._known: dict[tuple[Any, ...], Held] = {}
        self.by_number: dict[int, Held] = {}

    def check_allowed(self, folder: Path) -> None:
        """Refuse an adapter that lies elsewhere than allowed.

        Raises:
            PrefixMemoryError: names the folders that are.
        """
        if self._allowed is not None and not any(folder.resolve().is_relative_to(root) for root in self._allowed):
            raise PrefixMemoryError(
                f"{folder} lies outside of the folders that adapters are served from: "
                f"{', '.join(map(str, self._allowed))}. Copy it there."
            )

    def hold(self, folder: Path) -> Held:
        """The memory that lies in ``folder`` now.

        Raises:
            PrefixMemoryError: it is damaged, cannot be served, or lies outside of the allowed folders.
        """
        self.check_allowed(folder)
        key = (folder, *(_stamp(folder / name) for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)))
        if key not in self._known:
            self._known[key] = self._take(folder)
        return self._known[key]

    def _take(self, folder: Path) -> Held:
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise PrefixMemoryError(f"{folder / name} is missing. Copy it from where the adapter was saved.")
        with tempfile.TemporaryDirectory(dir=self._copies) as made:
            copy = Path(made) / "copy"
            try:
                copy.mkdir()
                for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
                    shutil.copyfile(folder / name, copy / name)
            except OSError as error:
                raise PrefixMemoryError(
                    f"{folder} cannot be copied to {self._copies} ({error.strerror}). Make room there, or set "
                    f"{COPIES} to another folder."
                ) from error
            try:
                self._check(copy)
                config = read_config(copy)
            except PrefixMemoryError as error:
                raise PrefixMemoryError(str(error).replace(str(copy), str(folder))) from error
            if config.active_from != "start" and config.invocation_tokens is None:
                raise PrefixMemoryError(
                    f"{folder} has active_from={config.active_from!r} without invocation_tokens: it was never trained."
                )
            content = _content(copy)
            number = _FIRST + int(content[:15], 16) % (_LAST - _FIRST)
            while number in self.by_number and self.by_number[number].content != content:
                number = _FIRST + (number + 1 - _FIRST) % (_LAST - _FIRST)
            if number not in self.by_number:
                place = self._copies / content
                copy.replace(place)  # whole or not at all
                self.by_number[number] = Held(content, number, place)
        return self.by_number[number]


def _content(folder: Path) -> str:
    """Hash of a memory's config and weights."""
    digest = hashlib.sha256()
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        with (folder / name).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written or replaced."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
