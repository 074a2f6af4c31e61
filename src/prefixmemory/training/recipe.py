"""Recipes: YAML files that say what to train, on what, and how; checked down to the line before anything runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig
from pydantic import TypeAdapter, ValidationError

from prefixmemory.errors import PrefixMemoryError, did_you_mean
from prefixmemory.files.yaml_files import Source, blamed_path, check_no_switch, explained, put, read_yaml
from prefixmemory.models.loading import Dtype
from prefixmemory.models.quantization import Quantization
from prefixmemory.rows.data import Data
from prefixmemory.training.methods import ANOTHER_KIND, DEFAULT, RECOMMENDED, method_config, method_fields, methods
from prefixmemory.training.settings import TrainingSettings


@dataclass(frozen=True)
class Recipe:
    """Everything that a training run is told.

    Args:
        model: base model: a folder, a ``.gguf`` file, a Hub id, or ``smollm2`` (SmolLM2-135M-Instruct).
        output: folder for the trained adapter.
        data: see :class:`~prefixmemory.rows.data.Data`.
        method: ``name`` of a PEFT method and fields of its config; the default is ``RECOMMENDED`` in ``methods.py``.
        training: see :class:`~prefixmemory.training.settings.TrainingSettings`.
        dtype: of the base model; ``auto`` keeps the checkpoint's.
        attention: as transformers' ``attn_implementation``; ``None`` is the model's default.
        quantization: quantise the frozen base model while loading it.
        report_to: trackers that receive the metrics: ``tensorboard``, ``trackio``, ``wandb``.
    """

    model: str
    output: str
    data: Data
    method: dict[str, Any] = field(default_factory=lambda: dict(RECOMMENDED))
    training: TrainingSettings = field(default_factory=TrainingSettings)
    dtype: Dtype = "auto"
    attention: str | None = None
    quantization: Quantization | None = None
    report_to: list[Literal["tensorboard", "trackio", "wandb"]] = field(default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", os.path.expanduser(self.output))

    def config(self) -> PeftConfig:
        """The PEFT config that ``method`` describes, made anew."""
        return method_config(self.method)


SECTIONS: dict[str, type] = {"data": Data, "training": TrainingSettings}
_ADAPTER = TypeAdapter(Recipe)
_MISSING = (
    "recipe: `prefixmemory recipes ls` lists those that ship with the package; `prefixmemory recipes cp NAME FILE` "
    "copies one."
)
_OPTIONS = {"model": "--model", "output": "--output", "data": "--data", "data.train": "--data"}
_EXPECTED = "a recipe is a mapping with model, data and output"


def load_recipe(
    file: Path | None, overrides: Mapping[str, Any] | None = None, options: Mapping[str, str] | None = None
) -> Recipe:
    """Read a recipe, lay ``overrides`` over it, check all of it.

    Args:
        file: YAML file; ``None``: the overrides are everything.
        overrides: values by dotted path, such as ``{"training.learning_rate": 1e-3}``.
        options: for messages: what the user wrote for each override, such as ``--learning-rate``.

    Raises:
        PrefixMemoryError: names the line, the field, and the nearest valid field or the allowed values.
    """
    content, lines = ({}, {}) if file is None else read_yaml(file, _MISSING, _EXPECTED)
    overrides = overrides or {}
    source = Source(file, lines, {path: f"--set {path}" for path in overrides} | dict(options or {}))
    for section in ("method", *SECTIONS):
        if section in content and content[section] is None:
            content.pop(section)  # all of its lines are comments
    of_another_kind = any(f"method.{name}" in overrides for name in ANOTHER_KIND)
    method = content.setdefault("method", {} if of_another_kind else dict(RECOMMENDED))
    if isinstance(method, dict):
        name = method.get("name", DEFAULT)
        if overrides.get("method.name", name) != name:
            content["method"] = {}  # the fields of one method mean nothing to another, nor does its learning rate
            if isinstance(content.get("training"), dict):
                content["training"].pop("learning_rate", None)
    for path, value in overrides.items():
        put(content, path, value, source)
    _check_names(content, source)
    try:
        recipe: Recipe = _ADAPTER.validate_python(content)
    except ValidationError as error:
        raise explained(error, source, _FIELDS, place="recipe", options=_OPTIONS) from None
    try:
        recipe.config()
    except PrefixMemoryError as error:
        raise source.error(blamed_path("method", str(error)), str(error)) from None
    name, given = recipe.method.get("name", DEFAULT), content.get("training", {})
    if name != DEFAULT and "learning_rate" not in given:
        raise source.error(
            "method.name",
            f"training.learning_rate is missing: that of a memory would not suit {name}. Give its own, such as 1e-3 "
            "for LoRA.",
        )
    if "validation_split" in content.get("data", {}) and recipe.data.validation is None:
        raise source.error(
            "data.validation_split",
            "data.validation_split needs data.validation: give the id of the data set once more.",
        )
    if recipe.training.keeps_best and recipe.data.validation is None:
        what = "patience" if recipe.training.patience is not None else "keep_best"
        raise source.error(f"training.{what}", f"training.{what} needs validation data: give data.validation.")
    return recipe


def _check_names(content: Mapping[str, Any], source: Source) -> None:
    """Unknown fields first: a typo is the cause where something else is missing, too."""
    known = {name: [f.name for f in fields(kind)] for name, kind in {"": Recipe, **SECTIONS}.items()}
    method = content.get("method")
    method_name = method.get("name", DEFAULT) if isinstance(method, dict) else DEFAULT
    known["method"] = ["name", *method_fields(method_name)] if method_name in methods() else []
    for section in known:
        inner = content if not section else content.get(section, {})
        if not isinstance(inner, dict):
            raise source.error(section, f"{section} is {inner!r}; it must be a section with its own fields.")
        for name in inner:
            path = f"{section}.{name}" if section else str(name)
            if name not in known[section] and known[section]:
                where = "a recipe" if section != "method" else method_name
                raise source.error(path, f"{path} is no field of {where}.{_nearest(str(name), section, known)}")
            if section in SECTIONS:
                check_no_switch(SECTIONS[section], name, inner[name], source, path)


def _nearest(name: str, section: str, known: Mapping[str, list[str]]) -> str:
    for other, names in known.items():
        if name in names:  # it stands in the wrong section
            return f" Did you mean '{other}.{name}'?" if other else f" Did you mean {name!r} at the top?"
    listed = f" {'Here' if section else 'At the top'} there are: {', '.join(known[section])}."
    return did_you_mean(name, known[section]) or listed


_FIELDS = {f.name for kind in (Recipe, Data, TrainingSettings) for f in fields(kind)}
