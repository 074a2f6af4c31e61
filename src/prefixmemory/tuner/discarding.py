"""Taking an adapter out of a model again, whole, whether or not its making came to an end."""

from __future__ import annotations

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from prefixmemory.tuner.layer import PrefixMemoryLayer
from prefixmemory.tuner.layers import memory_layers


def discard(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter, and layers left without any, out of a model."""
    for layer in memory_layers(model):
        if adapter_name in layer.prefix_memory_bank:
            PrefixMemoryLayer.delete_adapter(layer, adapter_name)
        if not layer.prefix_memory_bank:
            layer.detach()
    for module_name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            others = [name for name in module.active_adapters if name != adapter_name]
            module.delete_adapter(adapter_name, new_active_adapters=others)
            if not module._adapters:
                parent, _, child = module_name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.original_module)
    configs = getattr(model, "peft_config", {})
    configs.pop(adapter_name, None)
    if not configs:
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and "peft_config" in vars(module):
                del module.peft_config  # else PEFT warns of it when the model is adapted again
