"""Prefix vectors: p trainable keys and values per key/value head, and their output outside the softmax.

Steps 1 to 3 of ``reference.py``. Inside the softmax the vectors are prepended to the input's keys and values
(``attention/prepending.py``); outside they have an output of their own, by an exact softmax or through a feature map.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from prefixmemory._shapes import Float
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.kernels.impl import Product, known
from prefixmemory.kernels.read import memory_output
from prefixmemory.memories.feature_maps import build_feature_map
from prefixmemory.memories.registry import AUTO, MemorySite, register_memory

EPS = 1e-6

Placement = Literal["outside", "inside"]
Similarity = Literal["feature_map", "softmax"]


@register_memory(
    "prefix",
    instead="prefix_length=None",
    lacks={
        "rank": "prefix vectors are p keys and values; p is their rank",
        "share_heads": "prefix vectors are one set per key/value head anyhow",
        "normalize": "only a free memory's features are normalised",
        "dropout": "it drops features of a free memory's queries",
    },
)
class PrefixVectors(nn.Module):
    """The prefix of one attention module.

    Parameters, with one set per key/value head (query heads of a group share it, as they share the input's keys):

    - ``keys [kv_heads, length, head_dim]``, start as N(0, 1): the size of a trained key of unit features;
    - ``values [kv_heads, length, value_dim]``, start at zero: outside the softmax an untrained prefix adds nothing;
    - with ``reparameterize=m`` both come from ``embedding [length, m]`` through a two-layer MLP, as Li and Liang
      (2021) trained them; one MLP per layer here, one for all layers there.
    """

    is_builtin = True

    def __init__(
        self,
        site: MemorySite,
        *,
        prefix_length: int,
        placement: Placement = "outside",
        similarity: Similarity | None = None,
        normalizer: bool = False,
        reparameterize: int | None = None,
        feature_map: str | None = "elu",
        feature_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.inside = placement == "inside"
        self.normalizer, self.length = normalizer, prefix_length
        self.groups, self.scaling = site.kv_heads, site.scaling
        self.head_dim = site.head_dim
        self.feature_map: nn.Module | None = None
        self.map_name = str(feature_map)
        if not self.inside and similarity != "softmax":
            self.feature_map = build_feature_map(self.map_name, site.kv_heads, site.head_dim, feature_dim)
        self.uses_softmax = self.feature_map is None
        self.mlp = None
        if reparameterize is None:
            self.keys = nn.Parameter(torch.randn(site.kv_heads, prefix_length, site.head_dim))
            self.values = nn.Parameter(torch.zeros(site.kv_heads, prefix_length, site.value_dim))
        else:
            self.embedding = nn.Parameter(torch.randn(prefix_length, reparameterize))
            last = nn.Linear(reparameterize, site.kv_heads * (site.head_dim + site.value_dim))
            self.mlp = nn.Sequential(nn.Linear(reparameterize, reparameterize), nn.Tanh(), last)
            with torch.no_grad():  # values start at zero here too
                last.weight[site.kv_heads * site.head_dim :] = 0
                last.bias[site.kv_heads * site.head_dim :] = 0

    @staticmethod
    def settle(config: Any) -> None:
        """Refuse choices that exclude each other, with the reason; without a similarity, take the one that is left."""
        inside = config.placement == "inside"

        def refuse(field: str, needs: str, why: str) -> None:
            raise PrefixMemoryError(f"{field}={getattr(config, field)!r} needs {needs}: {why}.")

        if config.similarity in (None, AUTO):
            config.similarity = "softmax" if inside else "feature_map"
        if inside:
            outside = "placement='outside'"
            if config.similarity == "feature_map":
                refuse("similarity", outside, "inside, prefix and input share one softmax")
            if config.mixing != "none":
                refuse("mixing", outside, "inside, the softmax itself sets the prefix's share")
            if config.scale < 0:
                refuse("scale", outside, "inside, the scale multiplies the prefix's weights in the softmax")
            if config.output_limit not in (None, AUTO):
                refuse("output_limit", outside, "inside, the softmax itself sets the prefix's share")
        if config.similarity == "softmax":
            by_features = "similarity='feature_map' outside the softmax"
            if config.normalizer is True:
                refuse("normalizer", by_features, "a softmax is normalised already")
            for field in ("feature_map", "feature_dim"):
                if getattr(config, field) not in (None, AUTO):
                    refuse(field, by_features, "a softmax compares queries and keys as they are")
                setattr(config, field, None)

    def vectors(self) -> tuple[Float[Tensor, "g p d"], Float[Tensor, "g p v"]]:
        """Keys and values."""
        if self.mlp is None:
            return self.keys, self.values
        keys, values = self.mlp(self.embedding).tensor_split([self.groups * self.head_dim], dim=-1)
        by_group = (self.length, self.groups, -1)
        return keys.view(by_group).transpose(0, 1), values.view(by_group).transpose(0, 1)

    def forward(self, query: Float[Tensor, "*batch h d"]) -> Float[Tensor, "*batch h v"]:
        """Prefix attention normalised on its own (step 2), or its kernel form (step 3)."""
        if self.feature_map is None:
            keys, values = self.vectors()
            q = query.to(keys.dtype).unflatten(-2, (self.groups, -1))
            weights = torch.softmax(torch.einsum("...grd,gpd->...grp", q, keys).float() * self.scaling, dim=-1)
            return torch.einsum("...grp,gpv->...grv", weights.to(values.dtype), values).flatten(-3, -2)
        bank, normaliser = self.kernel()
        query = query.to(bank.dtype)
        output = memory_output(query, (bank,), self.feature_map)
        if self.normalizer:
            total = memory_output(query, (normaliser.unsqueeze(-1),), self.feature_map)
            # zero where ReLU leaves query and keys nothing in common: the output is then zero too, not 0 / 0
            output = output / torch.where(total.abs() < EPS, torch.full_like(total, EPS).copysign(total), total)
        return output

    def product(self) -> Product | str:
        """What is read in the place of ``forward``, or why it is no mere product."""
        if self.feature_map is None or self.normalizer:
            return "its output is divided by a sum over the prefix"
        return Product((self.matrix(),), self.feature_map, form=known(self.map_name))

    def kernel(self) -> tuple[Float[Tensor, "g f v"], Float[Tensor, "g f"]]:
        """B = Σ_p φ(k_p)v_pᵀ and n = Σ_p φ(k_p): all that the kernel form needs, whatever the prefix's length."""
        assert self.feature_map is not None
        keys, values = self.vectors()
        features = self.feature_map(keys)
        return torch.einsum("gpf,gpv->gfv", features, values), features.sum(dim=1)

    def matrix(self) -> Float[Tensor, "g f v"]:
        """B of the kernel form, for the readout."""
        return self.kernel()[0]
