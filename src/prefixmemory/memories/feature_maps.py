"""Feature maps φ and their registry.

A feature map turns queries ``[..., groups, repeat, head_dim]`` into features ``[..., groups, repeat, feature_dim]``.
``groups`` counts the memories of a layer and ``repeat`` the query heads that share one of them, so a map with
parameters can hold one set per memory. Most maps are one line; register your own the same way::

    @register_feature_map("cosine")
    def cosine(q):
        return torch.cos(q)

or, with parameters, as an ``nn.Module`` class built with ``(groups, head_dim, feature_dim)`` and carrying the
resulting ``feature_dim`` as an attribute. Tensor-parallel processes can divide its parameters among them if the first
axis of each counts ``groups``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prefixmemory._shapes import Float
from prefixmemory.errors import PrefixMemoryError, check_choice

FeatureMapFactory = Callable[[Tensor], Tensor] | type[nn.Module]
_FactoryT = TypeVar("_FactoryT", bound=FeatureMapFactory)

FEATURE_MAPS: dict[str, FeatureMapFactory] = {
    "elu": F.elu,  # the paper's default
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "identity": torch.positive,
    "softmax": partial(torch.softmax, dim=-1),  # no lambdas: models are pickled whole
}


def register_feature_map(name: str) -> Callable[[_FactoryT], _FactoryT]:
    """Decorator: make a function or an ``nn.Module`` class available as ``feature_map=name``.

    Raises:
        PrefixMemoryError: when the name is taken; names are never overwritten silently.
    """

    def register(factory: _FactoryT) -> _FactoryT:
        if name in FEATURE_MAPS:
            raise PrefixMemoryError(f"feature_map={name!r} is registered already. Choose another name.")
        FEATURE_MAPS[name] = factory
        return factory

    return register


class FunctionMap(nn.Module):
    """A feature map without parameters; its feature dimension is found by one call on zeros."""

    def __init__(self, function: Callable[[Tensor], Tensor], head_dim: int) -> None:
        super().__init__()
        self.function = function
        self.feature_dim = int(function(torch.zeros(1, 1, 1, head_dim, device="cpu")).shape[-1])

    def forward(self, q: Float[Tensor, "*batch g r d"]) -> Float[Tensor, "*batch g r f"]:
        """φ(q)."""
        return self.function(q)


@register_feature_map("mlp")
class MLPMap(nn.Module):
    """φ(q) = ReLU(Wq + b), trainable, one W and b per memory (the paper's "MLP kernel").

    W starts as N(0, 1/D) and b at zero, so that features start no larger than the query they come from.
    """

    def __init__(self, groups: int, head_dim: int, feature_dim: int | None) -> None:
        super().__init__()
        self.feature_dim = head_dim if feature_dim is None else feature_dim
        self.W = nn.Parameter(torch.randn(groups, head_dim, self.feature_dim) * head_dim**-0.5)
        self.b = nn.Parameter(torch.zeros(groups, self.feature_dim))

    def forward(self, q: Float[Tensor, "*batch g r d"]) -> Float[Tensor, "*batch g r f"]:
        """ReLU(Wq + b)."""
        return F.relu(torch.einsum("...grd,gdf->...grf", q, self.W) + self.b[:, None, :])


def build_feature_map(name: str, groups: int, head_dim: int, feature_dim: int | None) -> nn.Module:
    """The feature map called ``name`` for a layer with ``groups`` memories.

    Raises:
        PrefixMemoryError: unknown name, or ``feature_dim`` given for a map that has none.
    """
    check_choice("feature_map", name, FEATURE_MAPS)
    factory = FEATURE_MAPS[name]
    if isinstance(factory, type):
        module: nn.Module = factory(groups, head_dim, feature_dim)
        return module
    if feature_dim is not None:
        raise PrefixMemoryError(
            f"feature_dim={feature_dim} has no meaning for feature_map={name!r}, whose size follows from the head. "
            "Leave feature_dim out, or use feature_map='mlp'."
        )
    return FunctionMap(factory, head_dim)
