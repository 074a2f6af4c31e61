"""What PEFT is told of memories when the package is imported."""

from __future__ import annotations

import warnings

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import register_peft_method

from prefixmemory.memories.config import PrefixMemoryConfig
from prefixmemory.memories.peft_type import PREFIX_MEMORY
from prefixmemory.tuner.cache_rows import teach_caches
from prefixmemory.tuner.model import PrefixMemoryModel
from prefixmemory.tuner.peft_helpers import teach
from prefixmemory.tuner.replacing import check_on_load, check_on_load_by_transformers, teach_hotswap


def accept_adapter_names() -> None:
    """Silence PEFT's warning about adapter names that occur in ``prefix``; "ref", which TRL uses, does.

    It is meant for keys out of which PEFT takes the name by plain replacement; ours are taken apart at ``PLACES``.
    """
    message = f"Adapter name '.*' should not be contained in the prefix '{PrefixMemoryModel.prefix}'"
    warnings.filterwarnings("ignore", message, UserWarning)


def register() -> None:
    """Make ``PREFIX_MEMORY`` known to PEFT; called at import, and harmless when that happens again."""
    if PREFIX_MEMORY in PEFT_TYPE_TO_TUNER_MAPPING:
        return
    accept_adapter_names()
    check_on_load()
    check_on_load_by_transformers()
    teach_hotswap()
    teach()
    teach_caches()
    register_peft_method(
        name=PREFIX_MEMORY.lower(),
        config_cls=PrefixMemoryConfig,
        model_cls=PrefixMemoryModel,
        prefix=PrefixMemoryModel.prefix,
    )
