"""Weighted sums of adapters: which have one, and what its memory holds."""

from __future__ import annotations

from functools import reduce
from typing import cast

import torch
from torch import Tensor

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.memories.config import PrefixMemoryConfig
from prefixmemory.memories.matrix import Memory
from prefixmemory.tuner.layer import PrefixMemoryLayer


def check(adapters: list[str], configs: list[PrefixMemoryConfig], layers: list[list[PrefixMemoryLayer]]) -> None:
    """Refuse adapters that have no common sum.

    Args:
        adapters: their names.
        configs: theirs, in the same order.
        layers: the layers that each of them adapts.

    Raises:
        PrefixMemoryError: names the adapters, the reason and what to do instead.
    """
    advice = "Activate both with base_model.set_adapter([...]) instead: their answers add."
    for name, config in zip(adapters, configs, strict=True):
        if config.memory is not None:
            raise PrefixMemoryError(
                f"Adapter {name!r} cannot be summed: what memory={config.memory!r} answers need not be linear in "
                "its parameters. Activate several with base_model.set_adapter([...]) instead."
            )
        if config.prefix_length is not None:
            raise PrefixMemoryError(
                f"Adapter {name!r} cannot be summed: a sum of prefix vectors is not the sum of their answers. "
                "Activate several with base_model.set_adapter([...]) instead."
            )
        if config.mixing != "none":
            raise PrefixMemoryError(
                f"Adapter {name!r} cannot be summed: with mixing={config.mixing!r} its answer takes a share of the "
                "head's own output. Sum memories with mixing='none'."
            )
        if config.modules_to_save:
            raise PrefixMemoryError(
                f"Adapter {name!r} cannot be summed: it has modules_to_save={config.modules_to_save!r}, full "
                "copies of modules of the base model that have no sum. Train it without modules_to_save."
            )
    for name, config, adapted in zip(adapters[1:], configs[1:], layers[1:], strict=True):
        cannot = f"Adapters {adapters[0]!r} and {name!r} cannot be summed"
        for field in ("feature_map", "feature_dim", "normalize", "query", "share_heads", "answer_limit"):
            ours, theirs = getattr(configs[0], field), getattr(config, field)
            if ours != theirs:
                raise PrefixMemoryError(f"{cannot}: {field} is {ours!r} and {theirs!r}. {advice}")
        if adapted != layers[0]:
            raise PrefixMemoryError(f"{cannot}: they adapt different layers. {advice}")
        for layer in adapted:
            a, b = (cast(Memory, layer.memory(n)).feature_map.state_dict() for n in (adapters[0], name))
            if any(not torch.equal(a[key], b[key]) for key in a):
                raise PrefixMemoryError(f"{cannot}: their feature maps have different weights. {advice}")


def fill(layer: PrefixMemoryLayer, adapters: list[str], weights: list[float], into: str) -> float:
    """Fill the memory ``into`` of one layer with the weighted sum of the memories of ``adapters``; returns its scale.

    Raises:
        PrefixMemoryError: they subtract different means from their features, and no one mean stands for all.
    """
    target = cast(Memory, layer.memory(into))
    memories = [cast(Memory, layer.memory(name)) for name in adapters]
    scales = [layer.scale[name] for name in adapters]
    # One common scale stays a scale, so that the sum of one adapter with weight 1 is that adapter, bit for bit.
    common = scales[0] if len(set(scales)) == 1 else 1.0
    factors = [w * (1.0 if scale == common else scale) for w, scale in zip(weights, scales, strict=True)]
    layer.scale[into] = common
    target.to(reduce(torch.promote_types, (p.dtype for memory in memories for p in memory.parameters())))
    target.feature_map.load_state_dict(memories[0].feature_map.state_dict())
    if target.rank is None:
        parts = [factor * memory.matrix() for factor, memory in zip(factors, memories, strict=True)]
        target.M.copy_(torch.stack(parts).sum(dim=0))
    else:
        target.A.copy_(torch.cat([memory.A for memory in memories], dim=2))
        target.B.copy_(torch.cat([f * memory.B for f, memory in zip(factors, memories, strict=True)], dim=1))
    if target.has_mean:
        target.mean.copy_(_common_mean(target, memories, factors))
    return common


def _common_mean(target: Memory, memories: list[Memory], factors: list[float]) -> Tensor:
    """The μ with which the sum of memories answers (φ − μ)ᵀΣM as all of them together: μᵀΣM = Σ μ_iᵀM_i.

    Raises:
        PrefixMemoryError: there is none.
    """
    means = [memory.mean for memory in memories]
    if all(torch.equal(mean, means[0]) for mean in means):
        return means[0]
    if target.rank is None:
        whole = target.M.double()
        parts = [f * (m.mean.double()[:, None] @ m.matrix().double()) for f, m in zip(factors, memories, strict=True)]
        said = torch.stack(parts).sum(dim=0)
    else:  # factor by factor: μᵀA_i = μ_iᵀA_i
        whole = target.A.double()
        said = torch.cat([m.mean.double()[:, None] @ m.A.double() for m in memories], dim=-1)
    whole, said = whole.transpose(1, 2).cpu(), said.transpose(1, 2).cpu()
    mean = (torch.linalg.pinv(whole, rtol=1e-6) @ said).to(target.mean.dtype)  # as it will be stored
    if not torch.allclose(whole @ mean.double(), said, rtol=1e-4, atol=1e-6):
        raise PrefixMemoryError(
            "These adapters cannot be summed: they subtract different means from their features, and no one mean "
            "stands for all of them. Activate several with base_model.set_adapter([...]) instead: their answers add."
        )
    return cast(Tensor, mean)[..., 0].to(target.mean)
