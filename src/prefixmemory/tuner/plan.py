"""What a memory layer has to do in a forward pass, worked out when adapters, scales or modes change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from prefixmemory.kernels.impl import Product, fused, said
from prefixmemory.kernels.limit import add
from prefixmemory.kernels.read import read
from prefixmemory.memories.mixing import Mixing
from prefixmemory.memories.registry import is_inside
from prefixmemory.tuner.active_tokens import ActiveTokens, Invocation


@dataclass(frozen=True)
class Step:
    """One adapter's memory in one attention module.

    Attributes:
        name: of the adapter.
        memory: its memory.
        ask: queries ``[batch, tokens, heads, head_dim]`` to the memory output.
        queries: which queries it wants: ``content``, ``rotary``.
        scale: factor on what it adds.
        limit: c of :func:`~prefixmemory.kernels.limit.add`, or ``None``.
        mixing: how its output is mixed with the heads' own outputs; ``None``: it is added.
        invocation: the tokens from which on it speaks; ``None``: from the start.
        strict: whether a sequence without them is an error.
    """

    name: str
    memory: nn.Module
    ask: Callable[..., Tensor]
    queries: tuple[str, ...]
    scale: float
    limit: float | None
    mixing: Mixing | None
    invocation: Invocation | None = None
    strict: bool = False

    @property
    def inside(self) -> bool:
        """Whether it stands inside the softmax."""
        return is_inside(self.memory)

    def add_to(
        self, onto: Tensor, outputs: Tensor, queries: Mapping[str, Tensor], active: ActiveTokens | None = None
    ) -> Tensor:
        """``onto`` and what the memory adds to the heads' own ``outputs``, ``[batch, tokens, heads, value_dim]``.

        Tokens that are not ``active`` stay as they are; unless a compiler is at work, the memory is not asked for them.
        """
        if active is None:
            return self._added(onto, outputs, queries)
        if active.index is None:
            mask = active.on(onto.device).reshape(*onto.shape[:-2], 1, 1)
            return torch.where(mask, self._added(onto, outputs, queries), onto)
        if active.none:
            return onto
        index = active.index.to(onto.device)

        def chosen(x: Tensor) -> Tensor:
            return x.flatten(end_dim=-3).index_select(0, index)[None]

        own = chosen(outputs)
        joined = own if onto is outputs else chosen(onto)
        new = self._added(joined, own, {kind: chosen(query) for kind, query in queries.items()})
        return onto.flatten(end_dim=-3).index_copy(0, index, new[0]).view(onto.shape)

    def product(self) -> Product | str | None:
        """The memory as a product, or why it is none; ``None``: hooks wait for the memory to be called, as those do
        that take the means of features."""
        memory = self.memory
        hooks = (
            memory._forward_hooks or memory._forward_pre_hooks or memory._backward_hooks or memory._backward_pre_hooks
        )
        if hooks or hasattr(memory, "_hf_hook"):
            return None
        if self.mixing is not None:
            return "its output is mixed with the heads' own"
        if "product" not in vars(type(memory)) or "forward" in vars(memory):  # a subclass may do anything
            return "it is code of its own"
        if self.ask is not memory:
            return "it is asked by code of its own, or its heads are divided among processes"
        return memory.product()  # type: ignore[operator, no-any-return]

    @property
    def read_by(self) -> str:
        """``triton``, or ``torch`` with the reason."""
        return said(self.product, next(self.memory.parameters(), torch.empty(0)))

    def _added(self, onto: Tensor, outputs: Tensor, queries: Mapping[str, Tensor]) -> Tensor:
        product, joined = self.product(), None if onto is outputs else onto
        query = queries[self.queries[0]]
        if fused(product, outputs, onto, query):
            from prefixmemory.kernels import triton_read

            return triton_read.read(query, outputs, cast(Product, product), self.limit, self.scale, joined)
        if isinstance(product, Product):
            factors, phi = product.factors, product.phi
            keep = product.form in (None, ("identity", "none"))  # φ may be anything; or makes nothing to be kept
            query = query.to(factors[0].dtype)
            return read(query, outputs, factors, phi, product.mean, self.limit, self.scale, joined, keep)
        answer = self.ask(*[queries[kind] for kind in self.queries])
        if self.mixing is not None:
            answer = self.mixing(answer, outputs)
        return add(outputs, answer, self.limit, self.scale, onto)


class Plan:
    """The steps of a forward pass.

    Attributes:
        inside, outside: the memories that are read, by where they stand.
        by_name: those outside, by adapter.
        queries: the queries that they want between them.
        waiting: those, of either kind, that do not speak from the start.
        everywhere: ``None`` for each of those outside: it speaks on all tokens.
    """

    __slots__ = ("by_name", "everywhere", "inside", "outside", "queries", "waiting")

    def __init__(self, steps: list[Step]) -> None:
        steps = [step for step in steps if step.scale != 0]
        self.inside = [step for step in steps if step.inside]
        self.outside = [step for step in steps if not step.inside]
        self.waiting = [step for step in steps if step.invocation is not None]
        self.everywhere: list[ActiveTokens | None] = [None] * len(self.outside)
        self.by_name = {step.name: step for step in self.outside}
        self.queries = tuple(dict.fromkeys([kind for step in self.outside for kind in step.queries]))

    def __bool__(self) -> bool:
        return bool(self.inside or self.outside)


def score_bias(steps: list[Step], lengths: list[int], like: Tensor) -> Tensor | None:
    """What the scales of prefixes inside the softmax add to the scores of their keys, ``[1, keys]``; their logarithms.

    ``None`` where all scales are 1.
    """
    if all(step.scale == 1 for step in steps):
        return None
    parts = [like.new_full((length,), step.scale).log() for step, length in zip(steps, lengths, strict=True)]
    return torch.cat(parts)[None]
