"""Weighted sums of adapters: which have one. What it holds is the business of their memories."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.memories.config import PrefixMemoryConfig
from prefixmemory.memories.registry import MEMORY_FIELDS
from prefixmemory.tuner.layer import PrefixMemoryLayer

#: What adapters must have in common.
FIELDS = (
    "memory",
    "memory_options",
    "query",
    "output_limit",
    "feed_forward_limit",
    "head_scale",
    "active_from",
    "invocation_tokens",
    *(f for f in MEMORY_FIELDS if f not in ("rank", "dropout")),
)


def check(adapters: list[str], configs: list[PrefixMemoryConfig], layers: list[list[PrefixMemoryLayer]]) -> None:
    """Refuse adapters that have no common sum.

    Args:
        adapters: their names.
        configs: theirs, in the same order.
        layers: the layers that each of them adapts.

    Raises:
        PrefixMemoryError: names the adapters, the reason and what to do instead.
    """
    advice = "Activate both with base_model.set_adapter([...]) instead: their outputs add."
    for name, config in zip(adapters, configs, strict=True):
        if not config.kind.says("is_linear"):
            raise PrefixMemoryError(
                f"Adapter {name!r} cannot be summed: what memory={config.memory!r} answers need not be linear in "
                "its parameters. Activate several with base_model.set_adapter([...]) instead."
            )
        if config.mixing != "none":
            raise PrefixMemoryError(
                f"Adapter {name!r} cannot be summed: with mixing={config.mixing!r} its output replaces a part of the "
                "head's own output. Sum memories with mixing='none'."
            )
        for name_of_field in ("rank_pattern", "scale_pattern", "output_limit_pattern"):
            if getattr(config, name_of_field):
                raise PrefixMemoryError(
                    f"Adapter {name!r} cannot be summed: it has a {name_of_field}, and a sum has one value for all "
                    "layers. Activate several with base_model.set_adapter([...]) instead."
                )
        if config.trainable_token_indices:
            raise PrefixMemoryError(
                f"Adapter {name!r} cannot be summed: it has trainable_token_indices, embeddings that have no sum. "
                "Train it without them."
            )
        if config.modules_to_save:
            raise PrefixMemoryError(
                f"Adapter {name!r} cannot be summed: it has modules_to_save={config.modules_to_save!r}, full "
                "copies of modules of the base model that have no sum. Train it without modules_to_save."
            )
    for name, config, adapted in zip(adapters[1:], configs[1:], layers[1:], strict=True):
        cannot = f"Adapters {adapters[0]!r} and {name!r} cannot be summed"
        for field in FIELDS:
            ours, theirs = getattr(configs[0], field), getattr(config, field)
            if ours != theirs:
                raise PrefixMemoryError(f"{cannot}: {field} is {ours!r} and {theirs!r}. {advice}")
        if adapted != layers[0]:
            raise PrefixMemoryError(f"{cannot}: they adapt different layers. {advice}")
        for layer in adapted:
            a, b = (_maps(layer.memory(n)) for n in (adapters[0], name))
            if any(not torch.equal(a[key], b[key]) for key in a):
                raise PrefixMemoryError(f"{cannot}: their feature maps have different weights. {advice}")


def _maps(memory: nn.Module) -> dict[str, Tensor]:
    """The parameters of a memory's feature map."""
    feature_map = getattr(memory, "feature_map", None)
    return feature_map.state_dict() if isinstance(feature_map, nn.Module) else {}
