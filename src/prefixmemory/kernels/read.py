"""What a head says with its memory, o + s·limit((φ(q) − μ)ᵀM), as pure functions of tensors.

    a  = φ(q)ᵀM − μᵀM                    :func:`memory_output`
    o' = o + s·a·√(L / (L + |a|²))       ``limit.py``, with L = c²·|o|² + V·TINY
    :func:`read` is both.

Nothing here knows modules, adapters or calls. Symbols are those of ``reference.py``. Shapes: ``*b`` any batch axes,
``h`` query heads, ``g`` memories (h is a multiple of g: query head n reads memory n // (h / g)), ``d`` size of a query,
``f`` of its features, ``v`` of a head's output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from prefixmemory._shapes import Float
from prefixmemory.kernels.layout import by_head, by_memory
from prefixmemory.kernels.limit import add, add_product

#: φ: queries ``[*b, g, h / g, d]`` to features ``[*b, g, h / g, f]``.
FeatureMapFn = Callable[[Tensor], Tensor]


def memory_output(
    query: Float[Tensor, "*b h d"],
    factors: Sequence[Tensor],
    feature_map: FeatureMapFn,
    mean: Float[Tensor, "*s g f"] | None = None,
) -> Float[Tensor, "*b h v"]:
    """(φ(q) − μ)ᵀM, with M the product of ``factors``.

    μᵀM is one vector per memory, subtracted within the first product: the features are never centred themselves.

    Args:
        query: of every token and head, in the dtype of the factors.
        factors: ``(M,)`` with M ``[g, f, v]``, or ``(A, B)`` with ``[g, f, r]`` and ``[g, r, v]``; with one more axis
            in front, of as many memories as the first axis of ``query`` has rows: each row reads its own.
        feature_map: φ.
        mean: μ of each memory, a constant; ``None``: zero.
    """
    groups, size = factors[0].shape[-3:-1]
    heads = query.shape[-2]
    own = 1  # rows that have memories of their own
    if factors[0].ndim == 4:
        own = len(factors[0])
        factors = [factor.flatten(end_dim=1) for factor in factors]
        mean = mean if mean is None else mean.flatten(end_dim=1)
    features = feature_map(query.reshape(own, -1, groups, heads // groups, query.shape[-1]))
    if features.shape[1] == 1:  # operations cost more than their arithmetic
        rows = features.reshape(own * groups, -1, size)
        rows = rows if mean is None else rows - mean.to(rows.dtype).unsqueeze(1)
    else:
        rows = by_memory(features.flatten(2, 3), groups, own)
        if mean is not None:
            centre = mean.to(rows.dtype).unsqueeze(1)
            rows, factors = torch.baddbmm(torch.bmm(centre, factors[0]), rows, factors[0], beta=-1), factors[1:]
    for factor in factors:
        rows = torch.bmm(rows, factor)
    if features.shape[1] == 1:
        return rows.reshape(*query.shape[:-1], rows.shape[-1])
    return by_head(rows, query.shape[:-1], own)


def read(
    query: Float[Tensor, "*b h d"],
    outputs: Float[Tensor, "*b h v"],
    factors: Sequence[Tensor],
    feature_map: FeatureMapFn,
    mean: Float[Tensor, "*s g f"] | None = None,
    limit: float | None = None,
    scale: float = 1.0,
    onto: Float[Tensor, "*b h v"] | None = None,
    keep: bool = True,
) -> Float[Tensor, "*b h v"]:
    """What the heads say with their memories: :func:`memory_output` of ``query``, by ``add`` to ``outputs``.

    Args:
        query, outputs, factors, feature_map, mean, limit, scale, onto: as there.
        keep: whether features are kept for the backward pass, and what else is larger than a vector of rank r. If not,
            they are computed again there, which takes no longer than to keep them; φ must have no parameters and draw
            nothing at random. A compiler decides that by itself.
    """
    given = (query, outputs, onto, *factors)
    learns = torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in given])
    if not learns or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return add(outputs, memory_output(query, factors, feature_map, mean), limit, scale, onto)
    if limit is not None and len(factors) == 2:
        hidden = _again(keep, _output, feature_map, query, mean, factors[0])
        return add_product(outputs, hidden, factors[1], limit, scale, onto)
    return _again(keep, _read, (feature_map, limit, scale), query, outputs, onto, mean, *factors)


def _output(feature_map: FeatureMapFn, query: Tensor, mean: Tensor | None, *factors: Tensor) -> Tensor:
    return memory_output(query, factors, feature_map, mean)


def _read(rest: Any, query: Tensor, outputs: Tensor, onto: Tensor | None, mean: Tensor | None, *of: Tensor) -> Tensor:
    feature_map, limit, scale = rest
    return add(outputs, memory_output(query, of, feature_map, mean), limit, scale, onto)


def _again(keep: bool, work: Callable[..., Tensor], rest: Any, *given: Tensor | None) -> Tensor:
    """``work(rest, *given)``, which is done again in the backward pass unless what it makes is to be kept."""
    return work(rest, *given) if keep else cast(Tensor, _Again.apply(work, rest, *given))  # type: ignore[no-untyped-call]


class _Again(torch.autograd.Function):
    """Work that keeps its arguments alone."""

    @staticmethod
    def forward(ctx: Any, work: Callable[..., Tensor], rest: Any, *given: Tensor | None) -> Tensor:
        ctx.work, ctx.rest = work, rest
        kind = next(x.device.type for x in given if x is not None)
        has_any = torch.amp.is_autocast_available(kind)
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) if has_any else None
        ctx.save_for_backward(*given)
        return work(rest, *given)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed, again = ctx.needs_input_grad[2:], torch.is_grad_enabled()  # for gradients of gradients
        given: list[Any] = [
            x if x is None else x.view_as(x) if again else x.detach().requires_grad_(n)
            for x, n in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad(), nullcontext() if ctx.autocast is None else torch.autocast(*ctx.autocast):
            new = ctx.work(ctx.rest, *given)
        leaves = [x for x, n in zip(given, needed, strict=True) if n]  # o is not used without a limit
        found = iter(torch.autograd.grad(new, leaves, gradient, allow_unused=True, create_graph=again))
        return None, None, *[next(found) if n else None for n in needed]
