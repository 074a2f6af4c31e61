"""Prefix vectors: p trainable keys and values per key/value head, and what they answer outside the softmax.

Steps 1 to 3 of ``reference.py``. Inside the softmax the vectors stand beside the input's keys and values
(``inside.py``); outside they answer on their own, by an exact softmax or through a feature map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prefixmemory._shapes import Float
from prefixmemory.memories.combination import build_mixing
from prefixmemory.memories.config import PrefixMemoryConfig
from prefixmemory.memories.feature_maps import build_feature_map

EPS = 1e-6


class PrefixVectors(nn.Module):
    """The prefix of one attention layer.

    Parameters, with one set per key/value head (query heads of a group share it, as they share the input's keys):

    - ``keys [kv_heads, length, head_dim]``, start as N(0, 1): the size of a trained key of unit features;
    - ``values [kv_heads, length, value_dim]``, start at zero: outside the softmax an untrained prefix adds nothing;
    - with ``reparameterize=m`` both come from ``embedding [length, m]`` through a two-layer MLP, as Li and Liang
      (2021) trained them; one MLP a layer here, one for all layers there.
    """

    def __init__(
        self, config: PrefixMemoryConfig, heads: int, kv_heads: int, head_dim: int, value_dim: int, scaling: float
    ) -> None:
        super().__init__()
        assert config.prefix_length is not None
        self.query = config.query
        self.inside = config.placement == "inside"
        self.normalizer = config.normalizer
        self.mixing = build_mixing(config.mixing, heads, config.mix)
        self.repeat, self.groups, self.scaling = heads // kv_heads, kv_heads, scaling
        self.sizes = (kv_heads, config.prefix_length, head_dim, value_dim)
        self.feature_map: nn.Module | None = None
        if config.similarity == "feature_map":
            self.feature_map = build_feature_map(config.feature_map, kv_heads, head_dim, config.feature_dim)
        self.mlp = None
        if config.reparameterize is None:
            self.keys = nn.Parameter(torch.randn(kv_heads, config.prefix_length, head_dim))
            self.values = nn.Parameter(torch.zeros(kv_heads, config.prefix_length, value_dim))
        else:
            width = config.reparameterize
            self.embedding = nn.Parameter(torch.randn(config.prefix_length, width))
            last = nn.Linear(width, kv_heads * (head_dim + value_dim))
            self.mlp = nn.Sequential(nn.Linear(width, width), nn.Tanh(), last)
            with torch.no_grad():  # values start at zero here too
                last.weight[kv_heads * head_dim :] = 0
                last.bias[kv_heads * head_dim :] = 0

    def vectors(self) -> tuple[Float[Tensor, "g p d"], Float[Tensor, "g p v"]]:
        """Keys and values."""
        if self.mlp is None:
            return self.keys, self.values
        groups, length, head_dim, _ = self.sizes
        keys, values = self.mlp(self.embedding).tensor_split([groups * head_dim], dim=-1)
        by_group = (length, groups, -1)
        return keys.view(by_group).transpose(0, 1), values.view(by_group).transpose(0, 1)

    def forward(self, query: Float[Tensor, "*batch h d"]) -> Float[Tensor, "*batch h v"]:
        """Prefix attention normalised on its own (step 2), or its kernel form (step 3)."""
        keys, values = self.vectors()
        q = query.to(keys.dtype).unflatten(-2, (-1, self.repeat))
        if self.feature_map is None:
            weights = torch.softmax(torch.einsum("...grd,gpd->...grp", q, keys).float() * self.scaling, dim=-1)
            return torch.einsum("...grp,gpv->...grv", weights.to(values.dtype), values).flatten(-3, -2)
        bank, normaliser = self.kernel()
        features = self.feature_map(q)
        read = torch.einsum("...grf,gfv->...grv", features, bank)
        if self.normalizer:
            total = torch.einsum("...grf,gf->...gr", features, normaliser).unsqueeze(-1)
            # zero where ReLU leaves query and keys nothing in common: the answer is then zero too, not 0 / 0
            read = read / torch.where(total.abs() < EPS, torch.full_like(total, EPS).copysign(total), total)
        return read.flatten(-3, -2)

    def kernel(self) -> tuple[Float[Tensor, "g f v"], Float[Tensor, "g f"]]:
        """B = Σ_p φ(k_p)v_pᵀ and n = Σ_p φ(k_p): all that the kernel form needs, whatever the prefix's length."""
        assert self.feature_map is not None
        keys, values = self.vectors()
        features = self.feature_map(keys)
        return torch.einsum("gpf,gpv->gfv", features, values), features.sum(dim=1)
