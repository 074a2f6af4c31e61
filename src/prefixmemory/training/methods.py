"""PEFT methods by name, so that another method can be trained beside a memory with the same recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import prefixmemory.tuner
from prefixmemory.errors import PrefixMemoryError, check_choice, did_you_mean

prefixmemory.tuner.register()

DEFAULT = "prefix_memory"
#: What every PEFT config has, or a library writes into it: no choices of the method.
_COMMON = {field.name for field in fields(PeftConfig)} | {"base_model_fingerprint", "weights_sha256"}


def methods() -> list[str]:
    """Names of the methods that PEFT knows, ours first."""
    names = sorted(str(peft_type.value).lower() for peft_type in PEFT_TYPE_TO_CONFIG_MAPPING)
    return [DEFAULT, *(name for name in names if name != DEFAULT)]


def method_config(section: Mapping[str, Any]) -> PeftConfig:
    """The PEFT config of a recipe's ``method:`` section: ``name`` and the fields of that method's config.

    Raises:
        PrefixMemoryError: no such method or field, or a value that the method refuses.
    """
    values = dict(section)
    name = values.pop("name", DEFAULT)
    check_choice("method.name", name, methods())
    kind = next(cls for key, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if str(key.value).lower() == name)
    known = [field.name for field in fields(kind) if field.init and field.name not in _COMMON]
    for field in values:
        if field not in known:
            raise PrefixMemoryError(f"method.{field}: {name} has no such field.{did_you_mean(field, known)}")
    try:
        return kind(task_type="CAUSAL_LM", **values)
    except PrefixMemoryError:
        raise
    except (TypeError, ValueError) as error:
        raise PrefixMemoryError(f"method: {name} refuses these values: {error}") from error


def method_name(config: PeftConfig) -> str:
    """Name of the method of a config."""
    return str(getattr(config.peft_type, "value", config.peft_type)).lower()


def choices(config: PeftConfig) -> dict[str, Any]:
    """The fields of a config that are choices of its method, for records."""
    return {field.name: getattr(config, field.name) for field in fields(config) if field.name not in _COMMON}


def changed(config: PeftConfig) -> dict[str, Any]:
    """Those of :func:`choices` that are not the default."""
    defaults = {f.name: f.default if f.default is not MISSING else None for f in fields(config)}
    return {name: value for name, value in choices(config).items() if value and value != defaults[name]}
