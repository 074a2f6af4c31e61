"""Each row of a batch its own adapter: memories that differ in numbers alone are read together, others one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefixmemory.kernels.impl import Product, fused
from prefixmemory.kernels.read import read
from prefixmemory.tuner.activation import ModelPass
from prefixmemory.tuner.calls import Groups, RowAdapters
from prefixmemory.tuner.plan import Plan, Step

#: Rows an adapter, on average, up to which each row is given a copy of its memory: it costs less than further reads.
SHARED = 4


def add_by_row(
    plan: Plan, rows: RowAdapters, outputs: Tensor, queries: dict[str, Tensor], model_pass: ModelPass | None
) -> Tensor:
    """The heads' outputs with what each row's own adapter adds; ``model_pass``: on which tokens, ``None``: on all."""
    groups = rows.groups(outputs.shape[0], outputs.device)
    if model_pass is None or all([model_pass.active(step.invocation) is None for step in plan.outside]):
        if plan not in rows.stacks:
            rows.stacks[plan] = Stack.of(plan.outside)
        stack: Stack | None = rows.stacks[plan]
        new = None if stack is None else stack.add_to(outputs, queries, groups)
        if new is not None:
            return new
    return _one_by_one(plan, groups, outputs, queries, model_pass)


class Stack:
    """Memories that differ in numbers alone.

    Attributes:
        steps: by adapter.
        first: one of them; queries, limit and scale are those of all.
        names: the adapters.
        bank: limits, scales and forms, where the Triton kernel reads.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps, self.first = {step.name: step for step in steps}, steps[0]
        self.names = tuple(self.steps)
        self.bank: Any = None

    @classmethod
    def of(cls, steps: Sequence[Step]) -> Stack | None:
        """These memories as one; ``None`` if they are not alike."""
        first, product = steps[0], steps[0].product()
        for step in steps:
            other = step.product()
            if not isinstance(product, Product) or not isinstance(other, Product) or not other.is_like(product):
                return None
            if (step.queries, step.limit, step.scale) != (first.queries, first.limit, first.scale):
                return None
        return cls(steps)

    def add_to(self, outputs: Tensor, queries: dict[str, Tensor], groups: Groups) -> Tensor | None:
        """The heads' ``outputs`` with what each row's memory adds; rows that have none stay as they are.

        ``None``: they are better read one by one, since many rows share an adapter, or have to be, since hooks have
        come to wait for a memory.
        """
        query, products = queries[self.first.queries[0]], {}
        for name, step in self.steps.items():
            product = step.product()
            if not isinstance(product, Product):
                return None
            products[name] = product
        if fused(products[self.first.name], outputs, query):
            return self._fused(query, outputs, groups, list(products.values()))
        if len(groups.row) > SHARED * len(self.steps):
            return None
        own, index = outputs, groups.index_of(self.names)
        if index is not None:
            query, own = query.index_select(0, index), outputs.index_select(0, index)
        stacked = _stacked([products[name] for name in groups.row if name in products])
        query = query.to(stacked.factors[0].dtype)
        limit, scale = self.first.limit, self.first.scale
        new = read(query, own, stacked.factors, stacked.phi, stacked.mean, limit, scale)
        return new if index is None else outputs.index_copy(0, index, new)

    def _fused(self, query: Tensor, outputs: Tensor, groups: Groups, products: Sequence[Product]) -> Tensor:
        from prefixmemory.kernels import triton_read

        stacked, count = _stacked(products), len(products)
        assert stacked.form is not None
        if self.bank is None:
            limits, scales = [self.first.limit] * count, [self.first.scale] * count
            self.bank = triton_read.Bank.of(limits, scales, [stacked.form] * count, outputs.device)
        slots = groups.places(self.names)[:, None].expand(outputs.shape[:-2])
        return triton_read.read_bank(query, outputs, stacked.factors, slots, self.bank, stacked.mean)


def _stacked(products: Sequence[Product]) -> Product:
    """All of them, one behind the other."""
    factors = [torch.stack(each) for each in zip(*[product.factors for product in products], strict=True)]
    means = [product.mean for product in products if product.mean is not None]
    return replace(products[0], factors=tuple(factors), mean=torch.stack(means) if means else None)


def _one_by_one(
    plan: Plan, groups: Groups, outputs: Tensor, queries: dict[str, Tensor], model_pass: ModelPass | None
) -> Tensor:
    """Adapter after adapter, each on its rows."""
    if groups.order is not None:
        outputs = outputs.index_select(0, groups.order)
        queries = {kind: query.index_select(0, groups.order) for kind, query in queries.items()}
    parts = []
    for name, start, end in groups.slices:
        part, step = outputs[start:end], plan.by_name.get(name)
        if step is not None:
            span, invocation = slice(start, end), step.invocation
            active = None if model_pass is None else model_pass.active_in(groups, name, span, invocation)
            part = step.add_to(part, part, {kind: query[span] for kind, query in queries.items()}, active)
        parts.append(part)
    new = torch.cat(parts)
    return new if groups.back is None else new.index_select(0, groups.back)
