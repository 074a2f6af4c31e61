"""The method in plain PyTorch: every step from attention to PrefixMemory-Tuning, one function each.

This file is the oracle of the tests. It favours reading over speed: one batch of queries, explicit sums, no masks
beyond the one that is passed in, no caches. Symbols follow the paper (arXiv 2506.13674); ``docs/paper.md`` maps them
to the names used elsewhere.

Shapes: ``b`` batch, ``h`` query heads, ``g`` key/value heads (h is a multiple of g), ``i`` query tokens, ``j`` key
tokens, ``p`` prefix vectors, ``d`` head dimension of queries and keys, ``v`` head dimension of values, ``f`` feature
dimension D_phi.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prefixmemory._shapes import Bool, Float

FeatureMapFn = Callable[[Tensor], Tensor]


def repeat_kv(x: Float[Tensor, "b g j d"], heads: int) -> Float[Tensor, "b h j d"]:
    """Give each of the ``heads`` query heads its key/value head: query head ``n`` uses group ``n // (h / g)``."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def scores(
    q: Float[Tensor, "b h i d"],
    k: Float[Tensor, "b g j d"],
    scaling: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "b h i j"]:
    """log sim(q_i, k_j) = q_i·k_j / √D, optionally capped as in Gemma 2: c·tanh(s / c)."""
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    s = q @ repeat_kv(k, q.shape[1]).transpose(-1, -2) * scaling
    return s if softcap is None else softcap * torch.tanh(s / softcap)


def attention(
    q: Float[Tensor, "b h i d"],
    k: Float[Tensor, "b g j d"],
    v: Float[Tensor, "b g j v"],
    allowed: Bool[Tensor, "#b #h i j"] | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "b h i v"]:
    """Step 0, the frozen model: o_i = Σ_j sim(q_i, k_j) v_j / Σ_j sim(q_i, k_j), over the ``allowed`` pairs."""
    s = scores(q, k, scaling, softcap)
    if allowed is not None:
        s = s.masked_fill(~allowed, torch.finfo(s.dtype).min)
    return torch.softmax(s, dim=-1) @ repeat_kv(v, q.shape[1])


def prefix_share(
    q: Float[Tensor, "b h i d"],
    k: Float[Tensor, "b g j d"],
    prefix_k: Float[Tensor, "b g p d"],
    allowed: Bool[Tensor, "#b #h i j"] | None = None,
) -> Float[Tensor, "b h i 1"]:
    """α_i = Σ_p sim / (Σ_p sim + Σ_j sim): the share of attention that the prefix takes from the input."""
    inside = scores(q, k)
    if allowed is not None:
        inside = inside.masked_fill(~allowed, -torch.inf)
    prefix = torch.logsumexp(scores(q, prefix_k), dim=-1, keepdim=True)
    return torch.sigmoid(prefix - torch.logsumexp(inside, dim=-1, keepdim=True))


def prefix_tuning(
    q: Float[Tensor, "b h i d"],
    k: Float[Tensor, "b g j d"],
    v: Float[Tensor, "b g j v"],
    prefix_k: Float[Tensor, "b g p d"],
    prefix_v: Float[Tensor, "b g p v"],
    allowed: Bool[Tensor, "#b #h i j"] | None = None,
) -> Float[Tensor, "b h i v"]:
    """Step 1, Prefix-Tuning: (1 − α_i)·o_i + α_i·(prefix attention), one softmax over prefix and input."""
    alpha = prefix_share(q, k, prefix_k, allowed)
    return (1 - alpha) * attention(q, k, v, allowed) + alpha * attention(q, prefix_k, prefix_v)


def outside_prefix(
    q: Float[Tensor, "b h i d"],
    k: Float[Tensor, "b g j d"],
    v: Float[Tensor, "b g j v"],
    prefix_k: Float[Tensor, "b g p d"],
    prefix_v: Float[Tensor, "b g p v"],
    lam: float,
    allowed: Bool[Tensor, "#b #h i j"] | None = None,
) -> Float[Tensor, "b h i v"]:
    """Step 2, the prefix outside the softmax: λ·o_i + (1 − λ)·(prefix attention, normalised on its own)."""
    return lam * attention(q, k, v, allowed) + (1 - lam) * attention(q, prefix_k, prefix_v)


def kernel_prefix(
    q: Float[Tensor, "b h i d"],
    prefix_k: Float[Tensor, "b g p d"],
    prefix_v: Float[Tensor, "b g p v"],
    phi: FeatureMapFn,
) -> Float[Tensor, "b h i v"]:
    """Step 3, sim(q, k) ≈ φ(q)·φ(k): φ(q_i)ᵀB / φ(q_i)ᵀn with B = Σ_p φ(k_p)v_pᵀ and n = Σ_p φ(k_p)."""
    features = phi(repeat_kv(prefix_k, q.shape[1]))
    bank = features.transpose(-1, -2) @ repeat_kv(prefix_v, q.shape[1])
    normaliser = features.sum(dim=-2).unsqueeze(-1)
    return (phi(q) @ bank) / (phi(q) @ normaliser)


def read_memory(
    q: Float[Tensor, "b h i d"], memory: Float[Tensor, "h f v"], phi: FeatureMapFn
) -> Float[Tensor, "b h i v"]:
    """φ(q_i)ᵀM: the memory output of each head for each query."""
    return phi(q) @ memory


def prefix_memory(
    q: Float[Tensor, "b h i d"],
    k: Float[Tensor, "b g j d"],
    v: Float[Tensor, "b g j v"],
    memory: Float[Tensor, "h f v"],
    phi: FeatureMapFn,
    allowed: Bool[Tensor, "#b #h i j"] | None = None,
    memory_query: Float[Tensor, "b h i d"] | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "b h i v"]:
    """Step 4, PrefixMemory-Tuning: o_i + φ(q_i)ᵀM with a free, trainable M.

    ``memory_query`` is the query that the memory reads; ``None`` means the one that attention sees (rotated).
    """
    memory_query = q if memory_query is None else memory_query
    return attention(q, k, v, allowed, scaling, softcap) + read_memory(memory_query, memory, phi)


def limited(
    answer: Float[Tensor, "b h i v"], o: Float[Tensor, "b h i v"], limit: float, tiny: float = 1e-12
) -> Float[Tensor, "b h i v"]:
    """answer / √(1 + |answer|² / (c·|o|)²): our limit on step 4: no memory output is as long as c = ``limit`` times o.

    ``tiny`` stands in for the mean square of an o that is zero.
    """
    longest = limit**2 * o.pow(2).mean(dim=-1, keepdim=True) + tiny
    return answer * torch.sqrt(longest / (longest + answer.pow(2).mean(dim=-1, keepdim=True)))


def query_rms(phi: FeatureMapFn, eps: float = 1e-6) -> FeatureMapFn:
    """φ(q / rms(q)): each head's query is brought to unit root-mean-square first."""
    return lambda q: phi(q * torch.rsqrt(q.pow(2).mean(dim=-1, keepdim=True) + eps))


def feature_mean(phi: FeatureMapFn, mean: Float[Tensor, "h f"]) -> FeatureMapFn:
    """φ(q) − μ_h: what is the same for every query of a head is left out; μ_h is a constant, ``mean`` for each head."""
    return lambda q: phi(q) - mean[:, None]


def feature_l2(phi: FeatureMapFn, eps: float = 1e-6) -> FeatureMapFn:
    """φ(q) / ‖φ(q)‖₂: each head's features are brought to unit Euclidean length."""
    return lambda q: phi(q) * torch.rsqrt(phi(q).pow(2).sum(dim=-1, keepdim=True) + eps)
