"""The free memory: a trainable matrix per head, in full or in two factors (step 4 of ``reference.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from prefixmemory._shapes import Float
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.kernels.impl import Product, known
from prefixmemory.kernels.read import memory_output
from prefixmemory.memories.feature_maps import build_feature_map
from prefixmemory.memories.registry import MemorySite, register_memory

EPS = 1e-6

Normalize = Literal["none", "query_rms", "feature_l2", "feature_mean"]


@register_memory(
    "matrix",
    instead="prefix_length",
    lacks={
        "prefix_length": "it has no prefix vectors",
        "placement": "a free memory has no keys that could compete inside the softmax",
        "similarity": "a free memory has no keys to compare the query with",
        "reparameterize": "it is a way to train prefix vectors",
        "normalizer": "a free memory absorbs the normaliser (step 4 of the paper)",
    },
)
class MatrixMemory(nn.Module):
    """φ(q)ᵀM for the heads of one attention module.

    Parameters, with ``groups`` memories (one per query head, or one per key/value group with ``share_heads``):

    - full: ``M [groups, feature_dim, value_dim]``, starts at zero;
    - ``rank=r``: ``A [groups, feature_dim, r]``, starts as N(0, 1/feature_dim), and ``B [groups, r, value_dim]``,
      starts at zero, M = A·B;
    - ``feature_map``: the map's own parameters, if it has any;
    - ``normalize="feature_mean"``: ``mean [groups, feature_dim]``, not trained, zero until training begins.

    Zero start means that an untrained memory leaves the base model as it is.
    """

    is_builtin = is_linear = is_divisible = True
    output_limit = 0.5

    def __init__(
        self,
        site: MemorySite,
        *,
        feature_map: str = "elu",
        feature_dim: int | None = None,
        normalize: Normalize = "feature_mean",
        rank: int | None = 8,
        share_heads: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.normalize, self.rank, self.dropout, self.map_name = normalize, rank, dropout, feature_map
        self.groups = site.kv_heads if share_heads else site.heads
        self.feature_map = build_feature_map(feature_map, self.groups, site.head_dim, feature_dim)
        feature_dim = int(self.feature_map.feature_dim)  # type: ignore[arg-type]
        self.mean: nn.Parameter | None = None
        if normalize == "feature_mean":
            self.mean = nn.Parameter(torch.zeros(self.groups, feature_dim), requires_grad=False)
        if rank is None:
            self.M = nn.Parameter(torch.zeros(self.groups, feature_dim, site.value_dim))
        else:
            self.A = nn.Parameter(torch.randn(self.groups, feature_dim, rank) * feature_dim**-0.5)
            self.B = nn.Parameter(torch.zeros(self.groups, rank, site.value_dim))

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """What M is the product of."""
        return (self.M,) if self.rank is None else (self.A, self.B)

    def matrix(self) -> Float[Tensor, "g f v"]:
        """M, multiplied out if it is stored in two factors."""
        return self.M if self.rank is None else self.A @ self.B

    def features(self, query: Float[Tensor, "*b g r d"]) -> Float[Tensor, "*b g r f"]:
        """φ(q), normalised as asked for, its mean not yet subtracted."""
        if self.normalize == "query_rms":
            # squares overflow float16
            query = query * torch.rsqrt(query.float().pow(2).mean(dim=-1, keepdim=True) + EPS).to(query.dtype)
        features: Tensor = self.feature_map(query)
        if self.normalize == "feature_l2":
            length = torch.rsqrt(features.float().pow(2).sum(dim=-1, keepdim=True) + EPS)
            features = features * length.to(features.dtype)
        return features

    def forward(self, query: Float[Tensor, "*b h d"]) -> Float[Tensor, "*b h v"]:
        """(φ(q) − μ)ᵀM for every token and head, computed in the dtype of the memory (autocast applies)."""
        product = self.product()
        query = query.to(product.factors[0].dtype)
        return memory_output(query, product.factors, product.phi, product.mean)

    def product(self) -> Product:
        """What is read, for a fused kernel too."""
        if self.dropout and self.training:
            return Product(self.factors, self._dropped)
        norm = "none" if self.normalize == "feature_mean" else self.normalize
        return Product(self.factors, self.features, self.mean, known(self.map_name, norm))

    def _dropped(self, query: Tensor) -> Tensor:
        """Centred features, some of them dropped."""
        features = self.features(query)
        if self.mean is not None:
            features = features - self.mean[:, None].to(features.dtype)
        return functional.dropout(features, self.dropout)

    @torch.no_grad()
    def set_to_sum(self, memories: Sequence[MatrixMemory], weights: Sequence[float]) -> None:
        """Become Σ wₙ·Mₙ, with the features of ``memories``, which must have the same; ranks add up.

        Raises:
            PrefixMemoryError: they subtract different means from their features, and no one mean stands for all.
        """
        self.to(reduce(torch.promote_types, (p.dtype for memory in memories for p in memory.parameters())))
        self.feature_map.load_state_dict(memories[0].feature_map.state_dict())
        if self.rank is None:
            self.M.copy_(torch.stack([w * m.matrix() for w, m in zip(weights, memories, strict=True)]).sum(dim=0))
        else:
            self.A.copy_(torch.cat([memory.A for memory in memories], dim=2))
            self.B.copy_(torch.cat([w * memory.B for w, memory in zip(weights, memories, strict=True)], dim=1))
        if self.mean is not None:
            self.mean.copy_(self._common_mean(memories, weights))

    def _common_mean(self, memories: Sequence[MatrixMemory], weights: Sequence[float]) -> Tensor:
        """The μ with which the output (φ − μ)ᵀΣM of the sum is that of all memories together: μᵀΣM = Σ μₙᵀMₙ.

        Raises:
            PrefixMemoryError: there is none.
        """
        assert self.mean is not None
        means = [memory.mean for memory in memories if memory.mean is not None]
        if all(torch.equal(mean, means[0]) for mean in means):
            return means[0]
        if self.rank is None:
            whole = self.M.double()
            matrices = [weight * memory.matrix().double() for weight, memory in zip(weights, memories, strict=True)]
            parts = [mean.double()[:, None] @ matrix for mean, matrix in zip(means, matrices, strict=True)]
            said = torch.stack(parts).sum(dim=0)
        else:  # factor by factor: μᵀAₙ = μₙᵀAₙ
            whole = self.A.double()
            parts = [mean.double()[:, None] @ memory.A.double() for mean, memory in zip(means, memories, strict=True)]
            said = torch.cat(parts, dim=-1)
        whole, said = whole.transpose(1, 2).cpu(), said.transpose(1, 2).cpu()
        mean = (torch.linalg.pinv(whole, rtol=1e-6) @ said).to(self.mean.dtype)  # as it will be stored
        if not torch.allclose(whole @ mean.double(), said, rtol=1e-4, atol=1e-6):
            raise PrefixMemoryError(
                "These adapters cannot be summed: they subtract different means from their features, and no one mean "
                "stands for all of them. Activate several with base_model.set_adapter([...]) instead: their outputs "
                "add."
            )
        return cast(Tensor, mean[..., 0].to(self.mean))
