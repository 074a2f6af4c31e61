"""Tensor parallelism: a process that computes some of an attention module's heads reads only their memories.

transformers' tensor-parallel plans (``from_pretrained(..., tp_plan="auto")``) split the query projection by heads and
the output projection by what it reads, so that each of N processes sees 1/N of the heads. Memories stay whole on every
process: they are small, and are saved, loaded and optimised as always. A process reads with the part that belongs to
its heads; in the backward pass the parts of the gradient are gathered, so that all processes take the same step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from prefixmemory.attention.sites import AttentionSite
from prefixmemory.errors import PrefixMemoryError


@dataclass(frozen=True)
class HeadShare:
    """Which part of an attention module's heads a process computes: the ``rank``-th of ``ranks`` equal ones."""

    rank: int
    ranks: int
    group: dist.ProcessGroup

    def of_site(self, site: AttentionSite) -> AttentionSite:
        """The site as this process sees it in a forward pass."""
        blocks = site.blocks if site.blocks == 1 else site.blocks // self.ranks
        return replace(site, heads=site.heads // self.ranks, blocks=blocks)

    def check(self, memory: nn.Module, mixing: str) -> None:
        """Refuse a memory that cannot be divided by heads.

        Raises:
            PrefixMemoryError: its kind cannot, there are fewer memories than processes, or its parameters are not one
                set for each memory.
        """
        if not getattr(memory, "is_divisible", False) or mixing != "none":
            raise PrefixMemoryError(
                "Tensor-parallel processes can divide a free memory only: leave memory, prefix_length and mixing "
                "at their defaults, or load the model without tp_plan."
            )
        groups = int(cast(Any, memory).groups)
        if groups % self.ranks:
            raise PrefixMemoryError(
                f"{groups} memories cannot be divided among {self.ranks} tensor-parallel processes: use "
                "share_heads=False, or a number of processes that divides the number of heads."
            )
        for name, parameter in memory.named_parameters():
            if parameter.shape[:1] != (groups,):
                raise PrefixMemoryError(
                    f"{name} has shape {list(parameter.shape)}, not one set for each of {groups} memories, so "
                    "tensor-parallel processes cannot divide it. Use another feature_map, or train without tp_plan."
                )

    def read(self, memory: nn.Module, query: Tensor) -> Tensor:
        """φ(q)ᵀM for the heads of this process; ``query`` is ``[batch.., heads / ranks, head_dim]``."""
        own = {name: _OwnPart.apply(p, self) for name, p in memory.named_parameters()}  # type: ignore[no-untyped-call]
        return cast(Tensor, functional_call(memory, own, (query,)))


class _OwnPart(torch.autograd.Function):
    """The rows of a parameter that belong to this process; backward gathers the gradient of all rows."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, share: HeadShare) -> Tensor:
        ctx.share = share
        return parameter.chunk(share.ranks)[share.rank].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        parts = [torch.empty_like(gradient, memory_format=torch.contiguous_format) for _ in range(ctx.share.ranks)]
        dist.all_gather(parts, gradient.contiguous(), group=ctx.share.group)
        return torch.cat(parts), None


def head_share(model: nn.Module, name: str, site: AttentionSite) -> HeadShare | None:
    """The part of the heads of the attention module ``name`` that this process computes, ``None`` for all.

    A plan that gathers the query again, or leaves attention whole, needs nothing: every process computes all heads.

    Raises:
        PrefixMemoryError: the processes cannot share the heads, or ``model`` is a part of the model that was split.
    """
    ranks = getattr(model, "_tp_size", None) or 1
    weight = getattr(site.output_projection, "weight", None)
    if ranks == 1:
        if "tp" in (getattr(getattr(weight, "device_mesh", None), "mesh_dim_names", None) or ()):
            raise PrefixMemoryError(
                f"{name} is split over tensor-parallel processes by a plan that {type(model).__name__} does not hold. "
                "Make the memory for the whole model that from_pretrained returned."
            )
        return None
    plan: dict[str, str] = getattr(model, "tp_plan", {})
    if plan.get(re.sub(r"(?<=\.)\d+(?=\.)", "*", f"{name}.{site.output_path}")) != "rowwise":
        return None
    if site.heads % ranks or (site.blocks > 1 and site.blocks % ranks) or site.bias:
        raise PrefixMemoryError(
            f"The {site.heads} heads of {name} cannot be shared by {ranks} tensor-parallel processes. Use a number of "
            "processes that divides it, or load the model without tp_plan."
        )
    group = _group(model)
    return HeadShare(dist.get_rank(group), ranks, group)


@torch.no_grad()
def same_start(model: nn.Module, memories: Iterable[nn.Module]) -> None:
    """Give ``memories`` the start values of the first process on all that hold a part of ``model``.

    Each process holds every memory whole, and its own generator drew what does not start at zero.
    """
    if (getattr(model, "_tp_size", None) or 1) == 1:
        return
    group = _group(model)
    for memory in memories:
        for tensor in (*memory.parameters(), *memory.buffers()):
            if not tensor.is_meta:  # a checkpoint fills it
                dist.broadcast(tensor, dist.get_global_rank(group, 0), group)


def _group(model: nn.Module) -> dist.ProcessGroup:
    """The tensor-parallel processes of ``model``."""
    mesh = cast(Any, model)._device_mesh
    return cast(dist.ProcessGroup, mesh.get_group("tp") if mesh.ndim > 1 else mesh.get_group())
