"""What PEFT is told of memories when the package is imported."""

from __future__ import annotations

import warnings
from functools import wraps
from typing import Any

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import register_peft_method

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.memories.config import PrefixMemoryConfig
from prefixmemory.memories.peft_type import PREFIX_MEMORY
from prefixmemory.tuner import weighted_adapter
from prefixmemory.tuner.model import PrefixMemoryModel
from prefixmemory.tuner.peft_helpers import teach


def accept_adapter_names() -> None:
    """Silence PEFT's warning about adapter names that occur in ``prefix``; "ref", which TRL uses, does.

    It is meant for keys out of which PEFT takes the name by plain replacement; ours are taken apart at ``PLACES``.
    """
    message = f"Adapter name '.*' should not be contained in the prefix '{PrefixMemoryModel.prefix}'"
    warnings.filterwarnings("ignore", message, UserWarning)


def check_configs_on_load() -> None:
    """Refuse to load an adapter over one of the same name that has another config.

    ``PeftModel.load_adapter`` reads the config only for a new name, and would answer with the old config and the new
    weights. It is wrapped, once; adapters of other methods pass through.
    """
    original = PeftModel.load_adapter
    if getattr(original, "_checks_memories", False):
        return

    @wraps(original)
    def load_adapter(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        present = self.peft_config.get(adapter_name)
        if isinstance(present, PrefixMemoryConfig):
            options, _ = self._split_kwargs(kwargs)
            saved = PrefixMemoryConfig.from_pretrained(model_id, **options)
            for name in ("modules_to_save", "mixing", "mix", *weighted_adapter.FIELDS, "rank", "scale"):
                ours, theirs = getattr(present, name), getattr(saved, name)
                if name == "modules_to_save":  # PEFT lists the head of a classifier twice
                    ours, theirs = sorted(set(ours or ())), sorted(set(theirs or ()))
                if ours != theirs:
                    raise PrefixMemoryError(
                        f"{model_id} cannot be loaded over the adapter {adapter_name!r}: {name} is {theirs!r} there "
                        f"and {ours!r} here. Load it under another name, or delete_adapter({adapter_name!r}) first."
                    )
        return original(self, model_id, adapter_name, *args, **kwargs)

    load_adapter._checks_memories = True  # type: ignore[attr-defined]
    PeftModel.load_adapter = load_adapter


def register() -> None:
    """Make ``PREFIX_MEMORY`` known to PEFT; called at import, and harmless when that happens again."""
    if PREFIX_MEMORY in PEFT_TYPE_TO_TUNER_MAPPING:
        return
    accept_adapter_names()
    check_configs_on_load()
    teach()
    register_peft_method(
        name=PREFIX_MEMORY.lower(),
        config_cls=PrefixMemoryConfig,
        model_cls=PrefixMemoryModel,
        prefix=PrefixMemoryModel.prefix,
    )
