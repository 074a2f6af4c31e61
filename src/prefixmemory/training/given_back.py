"""The base model of a run, given back as it was: it may be shared with the runs that follow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from prefixmemory.models.loading import is_spread

#: What a module holds of others: its children and its hooks.
_HELD = (
    *("_modules", "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)
#: What trainers switch on the way: the mode, the probability of dropout, checkpointing.
_SWITCHED = ("training", "p", "gradient_checkpointing")


@contextmanager
def given_back(model: nn.Module) -> Iterator[None]:
    """Whatever an adapter and its trainer do to the structure of ``model`` within is undone in the end.

    Without it,

    - a method that PEFT refuses halfway leaves its first modules behind. PEFT takes the next adapter for a second one,
      beside which it freezes nothing: it would train the base model;
    - ``unload`` leaves trained copies in the place of ``modules_to_save``;
    - a run that ends with an error leaves the model in training mode, TRL leaves it without dropout, and gradient
      checkpointing stays on.

    Models that FSDP or DeepSpeed split are left alone: what splits them stands in the same places.
    """
    modules, own = list(model.modules()), set(vars(model))
    held = [(vars(module)[name], dict(vars(module)[name])) for module in modules for name in _HELD]
    switched = [{name: vars(module)[name] for name in _SWITCHED if name in vars(module)} for module in modules]
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        yield
    finally:
        if not is_spread():
            for now, before in held:
                now.clear()
                now.update(before)
            for module, values in zip(modules, switched, strict=True):
                for name in _SWITCHED:
                    vars(module).pop(name, None)  # what was its class's alone
                vars(module).update(values)
            for name in set(vars(model)) - own:  # peft_config
                delattr(model, name)
        if use_cache is not None:
            config.use_cache = use_cache  # the Trainer switches it off and leaves it so
