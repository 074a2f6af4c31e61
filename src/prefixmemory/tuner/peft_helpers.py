"""PEFT's helpers that know LoRA alone: taught what a memory is, or made to say what to do instead."""

from __future__ import annotations

from typing import Any

import peft.helpers
import peft.mixed_model
from peft import PeftConfig

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.memories.peft_type import PREFIX_MEMORY
from prefixmemory.tuner.layer import PrefixMemoryLayer

NO_MIXED_MODEL = (
    "PeftMixedModel knows adapters that wrap layers; a memory wraps none, and needs no mixed model. Give the model its "
    "LoRA first, peft.inject_adapter_in_model(lora_config, model), then get_peft_model(model, PrefixMemoryConfig()): "
    "both answer and learn."
)


def teach() -> None:
    """Let PEFT's helpers meet memories."""
    peft.helpers.LoraLayer = (peft.helpers.LoraLayer, PrefixMemoryLayer)  # rescale_adapter_scale asks isinstance
    check: Any = peft.mixed_model._check_config_compatible

    def check_config_compatible(peft_config: PeftConfig) -> None:
        if peft_config.peft_type == PREFIX_MEMORY:
            raise PrefixMemoryError(NO_MIXED_MODEL)
        check(peft_config)

    peft.mixed_model._check_config_compatible = check_config_compatible
