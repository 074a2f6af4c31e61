"""What a head says with its memory, o + s·limit((φ(q) − μ)ᵀM), as pure functions of tensors.

    a  = φ(q)ᵀM − μᵀM                    :func:`memory_output`
    o' = o + s·a·√(L / (L + |a|²))       :func:`add`, with L = c²·|o|² + V·TINY
    :func:`read` is both.

Nothing here knows modules, adapters or calls. Symbols are those of ``reference.py``. Shapes: ``*b`` any batch axes,
``h`` query heads, ``g`` memories (h is a multiple of g: query head n reads memory n // (h / g)), ``d`` size of a query,
``f`` of its features, ``v`` of a head's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefixmemory._shapes import Float

#: Stands in for the mean square of an output that is zero, so that the root has a slope there.
TINY = 1e-12

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
    tokens, repeat = math.prod(query.shape[:-2]) // own, heads // groups
    features = feature_map(query.reshape(own, tokens, groups, repeat, query.shape[-1]))
    by_memory = features if tokens == 1 else features.transpose(1, 2)
    rows = by_memory.reshape(own * groups, tokens * repeat, size)
    if mean is not None:
        centre = mean.to(rows.dtype).unsqueeze(1)
        if tokens == 1:  # operations cost more than their arithmetic
            rows = rows - centre
        else:
            rows, factors = torch.baddbmm(torch.bmm(centre, factors[0]), rows, factors[0], beta=-1), factors[1:]
    for factor in factors:
        rows = torch.bmm(rows, factor)
    if tokens != 1:
        rows = rows.view(own, groups, tokens, repeat, rows.shape[-1]).transpose(1, 2)
    return rows.reshape(*query.shape[:-1], rows.shape[-1])


def add(
    outputs: Float[Tensor, "*b h v"],
    answer: Float[Tensor, "*b h v"],
    limit: float | None = None,
    scale: float = 1.0,
    onto: Float[Tensor, "*b h v"] | None = None,
) -> Float[Tensor, "*b h v"]:
    """``onto`` + s·a, the memory output a no longer than c = ``limit`` times the head's own output.

    Short ones pass as they are, long ones come near the length c·|o|: no step of the optimiser can drown what a head
    says by itself, whatever the learning rate and the head's scale.

    Args:
        outputs: o, the heads' own outputs.
        answer: a, the memory output for them, in any floating-point dtype.
        limit: c; ``None``: no limit.
        scale: s.
        onto: what it is added to; ``None``: ``outputs``. Several memories are limited each by the heads' own outputs.
    """
    onto = outputs if onto is None else onto
    if limit is None:
        return torch.add(onto, answer.to(onto.dtype), alpha=scale)
    learns = torch.is_grad_enabled() and (outputs.requires_grad or answer.requires_grad)
    if learns and not torch.compiler.is_compiling():  # a compiler fuses what it derives itself
        return cast(Tensor, _AddLimited.apply(outputs, answer, onto, limit, scale))  # type: ignore[no-untyped-call]
    own, _, both = _squares(outputs, answer, limit)
    return _plus(onto, answer, (own / both).sqrt(), scale)


class _AddLimited(torch.autograd.Function):
    """onto + s·f·a with f = √(L / (L + |a|²)), L = c²·|o|² + V·TINY.

    With p = s·∂/∂out and d = Σ_v p·a, one number per token and head:

        ∂/∂a = f·p − d·f/(L + |a|²)·a
        ∂/∂o = d·f·c²·|a|²/(L·(L + |a|²))·o

    By hand because the gradient that torch derives passes over full-size tensors fifteen times.
    """

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, answer: Tensor, onto: Tensor, limit: float, scale: float) -> Tensor:
        own, length, both = _squares(outputs, answer, limit)
        factor = (own / both).sqrt()
        slope = factor / (both * limit**2)
        ctx.save_for_backward(outputs, answer, factor, slope, slope * length / own)
        ctx.scale = scale
        return _plus(onto, answer, factor, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        outputs, answer, factor, of_answer, of_outputs = ctx.saved_tensors
        given = gradient.to(answer.dtype) * ctx.scale
        along = (given * answer).sum(dim=-1, keepdim=True, dtype=factor.dtype)
        to_answer = _times(given, factor) - _times(answer, along * of_answer)
        to_outputs = None
        if ctx.needs_input_grad[0]:
            to_outputs = _times(outputs, along * of_outputs).to(outputs.dtype)
        return to_outputs, to_answer.to(answer.dtype), gradient, None, None


def _squares(outputs: Tensor, answer: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """L/c², |a|² and (L + |a|²)/c², ``[*b, h, 1]``, in float32 at least: squares of float16 would overflow."""
    wide = torch.float64 if torch.float64 in (outputs.dtype, answer.dtype) else torch.float32
    own = torch.linalg.vector_norm(outputs, dim=-1, keepdim=True, dtype=wide)
    length = torch.linalg.vector_norm(answer, dim=-1, keepdim=True, dtype=wide)
    own, length = own * own + outputs.shape[-1] * TINY / limit**2, length * length
    return own, length, torch.add(own, length, alpha=1 / limit**2)


def _plus(onto: Tensor, answer: Tensor, factor: Tensor, scale: float) -> Tensor:
    """``onto`` + s·f·a, rounded once to ``onto``'s dtype."""
    return torch.addcmul(onto, answer, factor, value=scale).to(onto.dtype)


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """x·factor in x's dtype; in float32 where x is float16, in which such factors are zero."""
    return x * (factor if x.dtype == torch.float16 else factor.to(x.dtype))


def read(
    query: Float[Tensor, "*b h d"],
    outputs: Float[Tensor, "*b h v"],
    factors: Sequence[Tensor],
    feature_map: FeatureMapFn,
    mean: Float[Tensor, "g f"] | None = None,
    limit: float | None = None,
    scale: float = 1.0,
    onto: Float[Tensor, "*b h v"] | None = None,
    keep: bool = True,
) -> Float[Tensor, "*b h v"]:
    """What the heads say with their memories: :func:`memory_output` of ``query``, by :func:`add` to ``outputs``.

    Args:
        query, outputs, factors, feature_map, mean, limit, scale, onto: as there.
        keep: whether features, hidden vectors and memory outputs are kept for the backward pass. If not, they are
            computed again there, which takes no longer than to keep them; φ must have no parameters and draw nothing
            at random. A compiler decides that by itself.
    """
    given = (query, outputs, onto, *factors)
    learns = torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in given])
    if keep or not learns or torch.compiler.is_compiling():
        return add(outputs, memory_output(query, factors, feature_map, mean), limit, scale, onto)
    rest = feature_map, limit, scale
    return cast(Tensor, _Read.apply(rest, query, outputs, onto, mean, *factors))  # type: ignore[no-untyped-call]


class _Read(torch.autograd.Function):
    """:func:`read` that keeps its arguments alone."""

    @staticmethod
    def forward(ctx: Any, rest: Any, query: Tensor, outputs: Tensor, onto: Any, mean: Any, *factors: Tensor) -> Tensor:
        feature_map, limit, scale = ctx.rest = rest
        kind = query.device.type
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.save_for_backward(query, outputs, onto, mean, *factors)
        return read(query, outputs, factors, feature_map, mean, limit, scale, onto)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed, again = ctx.needs_input_grad[1:], torch.is_grad_enabled()  # for gradients of gradients
        given: list[Any] = [
            x if x is None else x.view_as(x) if again else x.detach().requires_grad_(n)
            for x, n in zip(ctx.saved_tensors, needed, strict=True)
        ]
        query, outputs, onto, mean, *factors = given
        feature_map, limit, scale = ctx.rest
        kind, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(kind, dtype, enabled):
            new = read(query, outputs, factors, feature_map, mean, limit, scale, onto)
        leaves = [x for x, n in zip(given, needed, strict=True) if n]  # o is not used without a limit
        found = iter(torch.autograd.grad(new, leaves, gradient, allow_unused=True, create_graph=again))
        return None, *[next(found) if n else None for n in needed]
