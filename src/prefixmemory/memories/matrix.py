"""The trainable memory of one attention layer: parameters, start values, read."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prefixmemory._shapes import Float
from prefixmemory.memories.combination import build_mixing
from prefixmemory.memories.config import PrefixMemoryConfig
from prefixmemory.memories.feature_maps import build_feature_map

EPS = 1e-6


class Memory(nn.Module):
    """φ(q)ᵀM for the heads of one attention layer (step 4 of ``reference.py``).

    Parameters, with ``groups`` memories (one per query head, or one per key/value group with ``share_heads``):

    - full: ``M [groups, feature_dim, value_dim]``, starts at zero;
    - ``rank=r``: ``A [groups, feature_dim, r]``, starts as N(0, 1/feature_dim), and ``B [groups, r, value_dim]``,
      starts at zero, M = A·B;
    - ``feature_map``: the map's own parameters, if it has any;
    - ``normalize="feature_mean"``: a buffer ``mean [groups, feature_dim]``, zero until training begins.

    Zero start means that an untrained memory leaves the base model as it is.
    """

    mean: Tensor

    def __init__(self, config: PrefixMemoryConfig, heads: int, kv_heads: int, head_dim: int, value_dim: int) -> None:
        super().__init__()
        self.query = config.query
        self.inside = False
        self.mixing = build_mixing(config.mixing, heads, config.mix, config.answer_limit)
        self.normalize = config.normalize
        self.heads = heads
        self.groups = kv_heads if config.share_heads else heads
        self.feature_map = build_feature_map(config.feature_map, self.groups, head_dim, config.feature_dim)
        feature_dim = int(self.feature_map.feature_dim)  # type: ignore[arg-type]
        self.dropout = nn.Dropout(config.dropout)
        self.rank = config.rank
        self.takes_mean = self.has_mean = config.normalize == "feature_mean"
        self.is_divided = False  # among tensor-parallel processes, each of which answers for some of the groups
        if self.has_mean:
            # not persistent: accelerate's FSDP2 takes such tensors for parameters; it is saved all the same, below
            self.register_buffer("mean", torch.zeros(self.groups, feature_dim), persistent=False)
        if config.rank is None:
            self.M = nn.Parameter(torch.zeros(self.groups, feature_dim, value_dim))
        else:
            self.A = nn.Parameter(torch.randn(self.groups, feature_dim, config.rank) * feature_dim**-0.5)
            self.B = nn.Parameter(torch.zeros(self.groups, config.rank, value_dim))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.has_mean and not self.mean.is_meta:  # accelerate asks on the meta device which parameters to fill
            destination[prefix + "mean"] = self.mean if keep_vars else self.mean.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        held = self.has_mean and (prefix + "mean" in state_dict or not self.mean.is_meta)
        self._non_persistent_buffers_set -= {"mean"} if held else set()
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        finally:
            self._non_persistent_buffers_set |= {"mean"} if held else set()
        if held and not self.mean.is_meta and self.mean.any():
            self.takes_mean = False

    def matrix(self) -> Float[Tensor, "g f v"]:
        """M, multiplied out if it is stored in two factors."""
        return self.M if self.rank is None else self.A @ self.B

    def features(self, q: Float[Tensor, "*batch g r d"]) -> Float[Tensor, "*batch g r f"]:
        """φ(q), with the normalisation that the config asks for."""
        if self.normalize == "query_rms":
            q = q * torch.rsqrt(q.float().pow(2).mean(dim=-1, keepdim=True) + EPS).to(q.dtype)  # squares overflow fp16
        features: Tensor = self.feature_map(q)
        if self.normalize == "feature_l2":
            length = torch.rsqrt(features.float().pow(2).sum(dim=-1, keepdim=True) + EPS)
            features = features * length.to(features.dtype)
        if self.has_mean:
            if self.takes_mean and self.training and torch.is_grad_enabled():
                self._take_mean(features.detach())
            features = features - self.mean[:, None].to(features.dtype)
        return features

    def share_mean(self, other: Memory) -> None:
        """Subtract what ``other`` subtracts, if that is known already."""
        if self.has_mean and not (self.mean.is_meta or other.mean.is_meta) and other.mean.any():
            self.mean.copy_(other.mean)
            self.takes_mean = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _take_mean(self, features: Tensor) -> None:
        """Keep the mean of φ(q) over the first batch that is trained on, padding included, unless it has been loaded.

        Nothing has been learned by then, so that no answer changes; a memory that has learned without a mean goes on
        without one. Processes that train together, each on its part of the batch, take the mean of all parts.
        """
        blank = not (self.M if self.rank is None else self.B).any()
        if blank and not self.mean.any():
            features = features.float().flatten(end_dim=-4)
            sound = features.isfinite().all(dim=-1)  # a row that is all padding may have no finite query
            sums = torch.where(sound[..., None], features, 0.0).sum(dim=(0, 2))
            counts = sound.sum(dim=(0, 2)).float()
            if dist.is_available() and dist.is_initialized() and not self.is_divided:
                dist.all_reduce(sums)
                dist.all_reduce(counts)
            self.mean.copy_(sums / counts.clamp(min=1.0)[:, None])
        self.takes_mean = False

    def forward(self, query: Float[Tensor, "*batch h d"]) -> Float[Tensor, "*batch h v"]:
        """φ(q)ᵀM for every token and head, computed in the dtype of the memory (autocast applies)."""
        parameter = self.M if self.rank is None else self.A
        q = query.to(parameter.dtype).unflatten(-2, (-1, self.heads // self.groups))
        features = self.dropout(self.features(q))
        if self.rank is not None:
            features = torch.einsum("...grf,gfk->...grk", features, self.A)
        return torch.einsum("...grf,gfv->...grv", features, self.M if self.rank is None else self.B).flatten(-3, -2)
