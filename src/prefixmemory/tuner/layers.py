"""All memory layers of a model: where they are, and what is set in all of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

from torch import nn

from prefixmemory.errors import PrefixMemoryError, check_number
from prefixmemory.memories.registry import is_inside
from prefixmemory.tuner.activation import Listener
from prefixmemory.tuner.in_attention import InAttention
from prefixmemory.tuner.layer import PrefixMemoryLayer


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As ``model.named_modules()``, without what memory layers hold: it takes no longer for many adapters."""
    seen: set[nn.Module] = set()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        if not isinstance(module, PrefixMemoryLayer):
            start = f"{name}." if name else ""
            children = [(start + key, child) for key, child in module._modules.items() if child is not None]
            waiting += reversed(children)


def named_memory_layers(model: nn.Module) -> Iterator[tuple[str, PrefixMemoryLayer]]:
    """All memory layers of a model by their dotted names, in its order."""
    return ((name, module) for name, module in named_modules(model) if isinstance(module, PrefixMemoryLayer))


def memory_layers(model: nn.Module) -> list[PrefixMemoryLayer]:
    """All memory layers of a model, in its order."""
    return [layer for _, layer in named_memory_layers(model)]


def attention_layers(model: nn.Module) -> list[InAttention]:
    """Those of attention modules."""
    return [layer for layer in memory_layers(model) if isinstance(layer, InAttention)]


def reads_by(model: nn.Module) -> str | None:
    """What reads the active memories: ``triton``, or ``torch`` with the reason; ``None``: none is read."""
    plans = [layer.plan(None) for layer in memory_layers(model)]
    return "; ".join(dict.fromkeys(step.read_by for plan in plans if plan for step in plan.outside)) or None


def holders(model: nn.Module) -> list[nn.Module]:
    """``model`` and the parts of it that hold all of its memory layers, from the outside in."""
    paths = [name.split(".") for name, _ in named_memory_layers(model)]
    common = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
    found = [model.get_submodule(".".join(common[:n])) for n in range(len(common) + 1)]
    return [module for module in found if not isinstance(module, nn.ModuleList | nn.ModuleDict)]


def listen(model: nn.Module) -> None:
    """Have all memory layers of ``model`` told, in each forward pass, on which tokens they speak."""
    layers = memory_layers(model)
    present = layers[0].listener
    if present is not None and [id(layer) for layer in present.layers] == [id(layer) for layer in layers]:
        return
    for layer in layers:
        if layer.listener is not None:
            layer.listener.leave(layer)
    listener = Listener(holders(model))
    for layer in layers:
        layer.listener = listener
        listener.layers.append(layer)


def check_intact(model: nn.Module) -> None:
    """Refuse a model in which a projection with a memory has been replaced, which took the memory out of it.

    Raises:
        PrefixMemoryError: says which.
    """
    for layer in memory_layers(model)[:1]:
        layer.listener.check()


def set_scale(model: nn.Module, scale: float, adapter_name: str | None = None) -> None:
    """Set the scale of a memory at run time; 0 gives the base model exactly.

    Args:
        model: any model that holds memories, wrapped by PEFT or not.
        scale: factor on φ(q)ᵀM in every layer, in the place of ``scale`` and ``scale_pattern``; ``head_scale`` stays. A
            saved adapter keeps the scale of its config.
        adapter_name: which adapter; ``None`` means all active ones.
    """
    check_number("scale", scale)
    layers = memory_layers(model)
    known = {name for layer in layers for name in layer.prefix_memory_bank}
    if not known:
        raise PrefixMemoryError(f"{type(model).__name__} holds no memory. Make one with get_peft_model first.")
    if adapter_name is not None and adapter_name not in known:
        raise PrefixMemoryError(f"There is no memory called {adapter_name!r}; there are: {sorted(known)}.")
    for layer in layers:
        for name in layer.active_names() if adapter_name is None else [adapter_name]:
            if name in layer.scale:
                if scale < 0 and is_inside(layer.memory(name)):
                    raise PrefixMemoryError(f"scale={scale} is out of range: inside the softmax, give 0 or more.")
                layer.set_scale(name, float(scale))
