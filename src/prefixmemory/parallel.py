"""Tensor parallelism: a process that computes some of an attention module's heads reads only their memories.

transformers' tensor-parallel plans (``from_pretrained(..., tp_plan="auto")``) split the query projection by heads and
the output projection by what it reads, so that each of N processes sees 1/N of the heads. Memories stay whole on every
process: they are small, and are saved, loaded and optimised as always. A process reads with the part that belongs to
its heads; in the backward pass the parts of the gradient are gathered, so that all processes take the same step.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from prefixmemory.attention import AttentionSite
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.memory import Memory


@dataclass(frozen=True)
class HeadShare:
    """Which share of an attention module's heads a process computes: the ``rank``-th of ``ranks`` equal ones."""

    rank: int
    ranks: int
    group: dist.ProcessGroup

    def of_site(self, site: AttentionSite) -> AttentionSite:
        """The site as this process sees it in a forward pass."""
        return replace(site, heads=site.heads // self.ranks, kv_heads=max(site.kv_heads // self.ranks, 1))

    def check(self, memory: Memory) -> None:
        """Refuse a memory that cannot be divided by heads.

        Raises:
            PrefixMemoryError: fewer memories than processes, or parameters that are not one set per memory.
        """
        if memory.groups % self.ranks:
            raise PrefixMemoryError(
                f"{memory.groups} memories cannot be divided among {self.ranks} tensor-parallel processes: use "
                "share_heads=False, or a number of processes that divides the number of heads."
            )
        for name, parameter in memory.named_parameters():
            if parameter.shape[:1] != (memory.groups,):
                raise PrefixMemoryError(
                    f"{name} has shape {list(parameter.shape)}, not one set for each of {memory.groups} memories, so "
                    "tensor-parallel processes cannot divide it. Use another feature_map, or train without tp_plan."
                )

    def read(self, memory: Memory, query: Tensor) -> Tensor:
        """φ(q)ᵀM for the heads of this process; ``query`` is ``[batch.., heads / ranks, head_dim]``."""
        own = {name: cast(Tensor, _OwnPart.apply(p, self)) for name, p in memory.named_parameters()}
        return cast(Tensor, functional_call(memory, own, (query,)))


class _OwnPart(torch.autograd.Function):
    """The rows of a parameter that belong to this process; backward gathers the gradient of all rows."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, share: HeadShare) -> Tensor:
        ctx.share = share
        return parameter.chunk(share.ranks)[share.rank].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        parts = [torch.empty_like(gradient, memory_format=torch.contiguous_format) for _ in range(ctx.share.ranks)]
        dist.all_gather(parts, gradient.contiguous(), group=ctx.share.group)
        return torch.cat(parts), None


def head_share(model: nn.Module, name: str, site: AttentionSite) -> HeadShare | None:
    """The share of the heads of the attention module ``name`` that this process computes, ``None`` for all.

    A plan that gathers the query again, or leaves attention whole, needs nothing: every process computes all heads.

    Raises:
        PrefixMemoryError: the number of heads cannot be divided by the number of processes.
    """
    ranks = getattr(model, "_tp_size", None) or 1
    if ranks == 1:
        return None
    output = next(n for n, module in site.module.named_modules() if module is site.output_projection)
    plan: dict[str, str] = getattr(model, "tp_plan", {})
    if plan.get(re.sub(r"(?<=\.)\d+(?=\.)", "*", f"{name}.{output}")) != "rowwise":
        return None
    if site.heads % ranks:
        raise PrefixMemoryError(
            f"{name} has {site.heads} heads, which {ranks} tensor-parallel processes cannot share. Use a number of "
            "processes that divides it."
        )
    mesh = cast(Any, model)._device_mesh
    group = mesh.get_group("tp") if mesh.ndim > 1 else mesh.get_group()
    return HeadShare(dist.get_rank(group), ranks, group)
