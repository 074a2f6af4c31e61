"""Memories of one's own for the tests, registered for the length of each test that imports ``registered``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

import tiny
from prefixmemory import MemorySite, PrefixMemoryConfig, register_memory
from prefixmemory.memories.registry import MEMORIES

GATED = dict(memory="gated", memory_options={"bias": 0.5})


class Gated(nn.Module):
    """σ(wᵀq + b)·ELU(q)ᵀM."""

    def __init__(self, site: MemorySite, bias: float = 0.0) -> None:
        super().__init__()
        self.M = nn.Parameter(torch.zeros(site.heads, site.head_dim, site.value_dim))
        self.w = nn.Parameter(torch.zeros(site.heads, site.head_dim))
        self.b = nn.Parameter(torch.full((site.heads,), bias))

    def forward(self, query: Tensor) -> Tensor:
        gate = torch.sigmoid(torch.einsum("...hd,hd->...h", query, self.w) + self.b)
        return gate[..., None] * torch.einsum("...hd,hdv->...hv", F.elu(query), self.M)

    def matrix(self) -> Tensor:
        return self.M


class Offset(nn.Module):
    """One vector a head, whatever the query; it has no matrix."""

    def __init__(self, site: MemorySite) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(site.heads, site.value_dim))

    def forward(self, query: Tensor) -> Tensor:
        return self.b.expand(*query.shape[:-1], -1)


class Shared(nn.Module):
    """One M for all layers, which each layer's heads scale."""

    def __init__(self, site: MemorySite) -> None:
        super().__init__()
        self.first = site.first
        self.size = nn.Parameter(torch.ones(site.heads))
        if not site.first:
            self.M = nn.Parameter(torch.zeros(site.heads, site.head_dim, site.value_dim))

    def forward(self, query: Tensor) -> Tensor:
        M = self.first[0].M if self.first else self.M
        return torch.einsum("...hd,hdv,h->...hv", F.elu(query), M, self.size)


class Buffered(Offset):
    """Holds a mask that is made anew, and a fixed one that is saved."""

    def __init__(self, site: MemorySite) -> None:
        super().__init__(site)
        self.register_buffer("made", torch.ones(site.value_dim), persistent=False)
        self.register_buffer("fixed", torch.randint(1, 3, (site.value_dim,)).float())

    def forward(self, query: Tensor) -> Tensor:
        return super().forward(query) * self.made * self.fixed


OWN = {"gated": Gated, "offset": Offset, "shared": Shared, "buffered": Buffered}
FIELDS: dict[str, dict[str, Any]] = {name: dict(memory=name) for name in OWN} | {"gated": GATED}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The memories above, and nothing that a test registers stays."""
    before = dict(MEMORIES)
    for name, factory in OWN.items():
        register_memory(name)(factory)
    yield
    MEMORIES.clear()
    MEMORIES.update(before)


def logits(model: nn.Module, ids: Tensor | None = None, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.tokens() if ids is None else ids, use_cache=False, **kwargs).logits


def different(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-3)


def several() -> PeftModel:
    model = tiny.with_memory(tiny.build(), **GATED)
    for seed, (name, fields) in enumerate({"free": {}, "shared": dict(memory="shared"), "again": GATED}.items()):
        model.add_adapter(name, PrefixMemoryConfig(task_type="CAUSAL_LM", **fields))
        tiny.randomize(model, name, seed=seed + 3)
    return model.eval()


def run_as(model: PeftModel, *names: str) -> Tensor:
    model.base_model.set_adapter(list(names))
    return logits(model)
