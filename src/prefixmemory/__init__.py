"""PrefixMemory-Tuning (first published as Prefix-Tuning+) as a Hugging Face PEFT method.

Importing this package registers the PEFT type ``PREFIX_MEMORY``; from then on ``get_peft_model``,
``PeftModel.from_pretrained``, ``AutoPeftModelForCausalLM`` and trainers take a :class:`PrefixMemoryConfig` as they
take a ``LoraConfig``.
"""

import prefixmemory._imports  # noqa: F401  # isort: skip  # first: PEFT is imported there
from prefixmemory._version import __version__
from prefixmemory.adapters.loading import load_adapter
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.kernels.impl import set_impl
from prefixmemory.memories.config import PrefixMemoryConfig
from prefixmemory.memories.feature_maps import register_feature_map
from prefixmemory.memories.registry import MemorySite, register_memory
from prefixmemory.rows.invocation import invocation_tokens
from prefixmemory.tuner.activation import activation
from prefixmemory.tuner.calibration import calibrate
from prefixmemory.tuner.layers import set_scale
from prefixmemory.tuner.model import PrefixMemoryModel
from prefixmemory.tuner.registration import register

__all__ = [
    "MemorySite",
    "PrefixMemoryConfig",
    "PrefixMemoryError",
    "PrefixMemoryModel",
    "__version__",
    "activation",
    "calibrate",
    "invocation_tokens",
    "load_adapter",
    "register_feature_map",
    "register_memory",
    "set_impl",
    "set_scale",
]

register()
