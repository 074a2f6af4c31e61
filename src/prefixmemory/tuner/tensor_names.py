"""How the tensors of an adapter are called in a model, and in a checkpoint."""

from __future__ import annotations

from torch import Tensor, nn

from prefixmemory.attention.sites import CHILD
from prefixmemory.tuner.layer import PrefixMemoryLayer
from prefixmemory.tuner.layers import named_memory_layers

#: Where the tensors of an adapter lie, below their attention module. In the model the adapter's name follows; in a
#: checkpoint it is left out.
PLACES = tuple(f".{CHILD}.{place}." for place in PrefixMemoryLayer.adapter_layer_names)

#: What torch's activation checkpointing adds to the names of modules and parameters, not to those in a state dict.
WRAPPER = "_checkpoint_wrapped_module."

#: Names of the one child of modules that wrap a model or a layer.
WRAPPERS = ("_orig_mod", "module", "base_layer")


def tensors_of(model: nn.Module, adapter_name: str) -> dict[str, tuple[str, Tensor]]:
    """The tensors of an adapter's memories and their names in the model, by their names in a checkpoint."""
    found = {}
    for path, layer in named_memory_layers(model):
        for place in layer.adapter_layer_names:
            bank = getattr(layer, place)
            if adapter_name in bank:
                start = f"{path}.{place}.{adapter_name}."
                for key, tensor in bank[adapter_name].state_dict(prefix=start).items():
                    key = key.replace(WRAPPER, "")
                    stored = stored_name(key, adapter_name)
                    if stored is not None:
                        found[bare(stored)] = key, tensor
    return found


def bare(key: str) -> str:
    """A tensor's name without what wrappers around the base model put into it: PEFT, ``torch.compile``, DDP."""
    return ".".join(part for part in key.replace("base_model.model.", "").split(".") if part not in WRAPPERS)


def unwrapped(key: str) -> str:
    """A tensor's name as it is without ``torch.compile`` around the base model, and without LoRA around a projection:
    what is saved does not depend on them."""
    return ".".join(part for part in key.split(".") if part not in ("_orig_mod", "base_layer"))


def embeddings_of(model: nn.Module) -> list[nn.Module]:
    """The input and output embeddings of a model, as far as it has them."""
    getters = (getattr(model, f"get_{end}_embeddings", None) for end in ("input", "output"))
    return [module for get in getters if get is not None and (module := get()) is not None]


def stored_name(key: str, adapter_name: str) -> str | None:
    """The name that a tensor of an adapter has in a checkpoint; ``None`` if it is not this adapter's."""
    for place in PLACES:
        if f"{place}{adapter_name}." in key:
            return key.replace(f"{place}{adapter_name}.", place)
    return None
