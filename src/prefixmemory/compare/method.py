"""A method of a comparison: what is trained, and around which learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from peft import PeftConfig

from prefixmemory.errors import PrefixMemoryError, check_choice
from prefixmemory.files.names import check_name
from prefixmemory.files.yaml_files import Source, find_yaml, read_yaml, shipped, typed
from prefixmemory.training.methods import method_config

Kind = Literal["adapter", "full", "in_context", "base"]


@dataclass(frozen=True)
class Method:
    """One column of the comparison.

    Args:
        name: how suites call it.
        description: one line.
        kind: ``adapter`` (a PEFT method), ``full`` (all weights are trained), ``in_context`` (examples stand in the
            prompt, nothing is trained), ``base`` (the model as it is).
        adapter: for ``adapter``: ``name`` of the PEFT method and fields of its config, as a recipe's ``method:``.
        learning_rate: the middle of the candidates, for what is trained.
        shots: for ``in_context``: examples of each label, or in all where rows have no labels.
        training: settings that suit the method, over the task's and the suite's.
    """

    name: str
    description: str
    kind: Kind = "adapter"
    adapter: dict[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None
    shots: int | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name("name", self.name)
        check_choice("kind", self.kind, get_args(Kind))
        if self.is_trained and not (self.learning_rate or 0) > 0:
            raise PrefixMemoryError(f"learning_rate={self.learning_rate!r} is out of range: give the middle candidate.")
        if self.kind == "in_context" and (self.shots or 0) < 1:
            raise PrefixMemoryError(f"shots={self.shots!r} is out of range: give a number above 0.")
        if self.kind != "adapter" and self.adapter:
            raise PrefixMemoryError(f"adapter={self.adapter!r} needs kind='adapter': nothing is attached otherwise.")
        if self.kind == "adapter":
            self.config()

    @property
    def is_trained(self) -> bool:
        """Whether there is something to train."""
        return self.kind in ("adapter", "full")

    def config(self) -> PeftConfig:
        """The PEFT config of an ``adapter``, made anew."""
        return method_config(self.adapter)


def shipped_methods() -> list[str]:
    """Names of the methods that ship with the package."""
    return list(shipped("compare/methods"))


def load_method(name: str, changes: Mapping[str, Any] | None = None, beside: Path | None = None) -> Method:
    """The shipped method ``name``, or the one in a YAML file.

    Args:
        name: a shipped method, or the path of a ``.yaml`` file.
        changes: fields to change, as a suite may.
        beside: folder to which a path is relative; default: the current one.

    Raises:
        PrefixMemoryError: no such method, or its file is wrong; the message names line and field.
    """
    return _read(find_yaml(name, "compare/methods", "method", beside), changes)


def _read(file: Path, changes: Mapping[str, Any] | None) -> Method:
    hint = "method: Give a YAML file with name, description, adapter and learning_rate."
    content, lines = read_yaml(file, hint, "a method is a mapping")
    changed = {name: f"{name}, which the suite changes" for name in changes or {}}
    return typed(Method, {**content, **(changes or {})}, Source(file, lines, changed), "a method")
