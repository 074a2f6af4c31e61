"""PEFT methods by name, so that another method can be trained beside a memory with the same recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import PreTrainedModel

import prefixmemory.tuner.registration
from prefixmemory.errors import PrefixMemoryError, check_choice, did_you_mean
from prefixmemory.memories.patterns import check_patterns
from prefixmemory.rows.invocation import ALORA, NAMES

prefixmemory.tuner.registration.register()

DEFAULT = "prefix_memory"
#: The ``method:`` section of a run that has none: what did best in ``docs/comparison.md``.
RECOMMENDED = {"name": DEFAULT, "feed_forward": 8, "active_from": "auto"}
#: Fields that ask for another kind of memory, to which that does not apply.
ANOTHER_KIND = ("placement", "prefix_length", "memory")
#: What every PEFT config has, or a library writes into it: no choices of the method.
_COMMON = {field.name for field in fields(PeftConfig)} | {"base_model_fingerprint", "weights_sha256"}
#: Methods that need more than rows and a Trainer.
_NOT_HERE = {
    "adalora": "a training loop that reallocates its ranks",
    "cpt": "examples that are part of its config",
    "multitask_prompt_tuning": "a task id with every row",
    "poly": "a task id with every row",
    "trainable_tokens": "tokens that were added to the vocabulary",
    "xlora": "LoRAs that were trained before",
}
#: Start values of LoRA that take a part out of the base weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def methods() -> list[str]:
    """Names of the methods that PEFT knows, ours first."""
    names = sorted(str(peft_type.value).lower() for peft_type in PEFT_TYPE_TO_CONFIG_MAPPING)
    return [DEFAULT, *(name for name in names if name != DEFAULT)]


def _config_class(name: str) -> type[PeftConfig]:
    check_choice("method.name", name, methods())
    by_name: dict[str, type[PeftConfig]] = {str(k.value).lower(): cls for k, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    return by_name[name]


def method_fields(name: str) -> list[str]:
    """The fields of a method's config that are choices of the method."""
    return [field.name for field in fields(_config_class(name)) if field.init and field.name not in _COMMON]


def method_config(section: Mapping[str, Any]) -> PeftConfig:
    """The PEFT config of a recipe's ``method:`` section: ``name`` and the fields of that method's config.

    Raises:
        PrefixMemoryError: no such method or field, a value of the wrong type, or one that the method refuses.
    """
    values = dict(section)
    name = values.pop("name", DEFAULT)
    check_choice("method.name", name, methods())
    if name in _NOT_HERE:
        raise PrefixMemoryError(f"method.name={name!r} cannot be trained by a recipe: it needs {_NOT_HERE[name]}.")
    kind, known = _config_class(name), method_fields(name)
    hints = get_type_hints(kind)
    for field, value in values.items():
        if field not in known:
            raise PrefixMemoryError(f"method.{field} is no field of {name}.{did_you_mean(str(field), known)}")
        if field == ALORA and isinstance(value, str):
            check_choice(f"method.{field}", value, NAMES)  # the tokens are found in the rows
        else:
            _check_type(field, value, hints[field])
    try:
        config = kind(task_type="CAUSAL_LM", **values)
    except PrefixMemoryError:
        raise
    except (TypeError, ValueError) as error:
        raise PrefixMemoryError(f"method: {name} refuses these values: {error}") from error
    check_patterns(config)
    if getattr(config, "bias", None) not in (None, False, "none"):
        raise PrefixMemoryError(
            f"method.bias={values.get('bias')!r} trains the base model's own biases, which stay changed when it is "
            "switched off or taken off, so that nothing could be compared with the base model. Leave it out."
        )
    if str(getattr(config, "init_lora_weights", "")).startswith(_CHANGES_BASE):
        raise PrefixMemoryError(
            f"method.init_lora_weights={values['init_lora_weights']!r} changes the base model's weights, so that the "
            "adapter would not fit the base model that others load. Leave it out, or use 'gaussian' or 'orthogonal'."
        )
    if getattr(config, "num_virtual_tokens", 1) is None:
        raise PrefixMemoryError(f"method.num_virtual_tokens is missing: {name} needs it, such as 20.")
    return config


def _check_type(field: str, value: Any, hint: Any) -> None:
    """Refuse a value of another type than ``hint``: the dataclasses of PEFT take anything, and fail when it is used."""
    if value is None:
        return
    try:
        TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError as error:
        problems = [problem for problem in error.errors() if problem["type"] != "literal_error"]
        if problems and not isinstance(value, dict):  # configs within configs, and choices, are checked by PEFT
            message = problems[-1]["msg"]
            raise PrefixMemoryError(f"method.{field}={value!r}: {message[0].lower()}{message[1:]}.") from error


def attach(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """``get_peft_model``, with one line for a config that does not suit the model.

    Raises:
        PrefixMemoryError: the method refuses the model, or its config names modules that the model does not have.
    """
    try:
        return get_peft_model(model, config)
    except PrefixMemoryError:
        raise
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        name = method_name(config)
        raise PrefixMemoryError(f"method: {name} cannot be attached to {type(model).__name__}: {error}") from error


def method_name(config: PeftConfig) -> str:
    """Name of the method of a config."""
    return str(getattr(config.peft_type, "value", config.peft_type)).lower()


def choices(config: PeftConfig) -> dict[str, Any]:
    """The fields of a config that are choices of its method, for records."""
    return {field.name: getattr(config, field.name) for field in fields(config) if field.name not in _COMMON}
