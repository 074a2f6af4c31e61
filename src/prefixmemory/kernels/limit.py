"""What a memory says, added to what a head says by itself, and kept shorter than that: o + s·a·√(L / (L + |a|²)) with
L = c²·|o|² + V·TINY, as pure functions of tensors.

Where a is a product h·B and is to be learned, a itself is never made: :func:`add_product`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefixmemory._shapes import Float
from prefixmemory.kernels.layout import by_head, by_memory

#: Stands in for the mean square of an output that is zero, so that the root has a slope there.
TINY = 1e-12


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off on the device of ``x``, if it has any."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


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
    # a compiler fuses what it derives itself, and torch.func takes no function with a gradient of its own
    if learns and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        return cast(Tensor, _AddLimited.apply(outputs, answer, onto, limit, scale))  # type: ignore[no-untyped-call]
    own, _, both = _squares(outputs, answer, limit)
    return _plus(onto, answer, (own / both).sqrt(), scale)


def add_product(
    outputs: Float[Tensor, "*b h v"],
    hidden: Float[Tensor, "*b h r"],
    B: Float[Tensor, "*s g r v"],
    limit: float,
    scale: float = 1.0,
    onto: Float[Tensor, "*b h v"] | None = None,
) -> Float[Tensor, "*b h v"]:
    """:func:`add` of a = h·B, for training: the backward pass keeps o and h, and a is made in neither.

    Args:
        outputs, limit, scale, onto: as there.
        hidden: h.
        B: of each memory; with one more axis in front, of as many memories as the first axis of ``outputs`` has rows.
    """
    given = outputs, hidden, B, onto, limit, scale
    return cast(Tensor, _AddProduct.apply(*given))  # type: ignore[no-untyped-call]


class _AddProduct(torch.autograd.Function):
    """onto + s·f·hB with f = √(L / (L + |a|²)), and |a|² = h·G·h for the Gram matrix G = BBᵀ.

    With p = s·∂/∂out, k = f/(L + |a|²), and d = h·pBᵀ, one number per token and head:

        ∂/∂h = f·pBᵀ − d·k·hG
        ∂/∂B = (f·h)ᵀp − (d·k·h)ᵀh·B
        ∂/∂o = d·k·c²·|a|²/L·o

    Of what is as large as o, a product is read once for each of pBᵀ and hᵀp, and o once.
    """

    @staticmethod
    def forward(
        ctx: Any, outputs: Tensor, hidden: Tensor, B: Tensor, joined: Tensor | None, limit: float, scale: float
    ) -> Tensor:
        own, onto = len(B) if B.ndim == 4 else 1, outputs if joined is None else joined
        ctx.groups, ctx.own, ctx.scale = B.shape[-3], own, scale
        with without_autocast(outputs):
            last, rows = B.flatten(end_dim=-3).to(hidden.dtype), by_memory(hidden, B.shape[-3], own)
            wide = torch.float64 if torch.float64 in (outputs.dtype, hidden.dtype) else torch.float32
            h, gram = rows.to(wide), last.to(wide) @ last.to(wide).mT
            length = (torch.bmm(h, gram) * h).sum(dim=-1, keepdim=True).clamp_(min=0)
            size = by_memory(torch.linalg.vector_norm(outputs, dim=-1, keepdim=True, dtype=wide), B.shape[-3], own)
            most = size * size * limit**2 + outputs.shape[-1] * TINY
            both = most + length
            factor = (most / both).sqrt()
            spoken = (h * (factor * scale)).to(hidden.dtype)
            if len(last) == 1 and onto.dtype == hidden.dtype:
                # no view, since a model may write into it
                new = torch.empty_like(onto, memory_format=torch.contiguous_format)
                torch.baddbmm(by_memory(onto, 1), spoken, last, out=by_memory(new, 1))
            else:
                new = (onto + by_head(torch.bmm(spoken, last), onto.shape[:-1], own)).to(onto.dtype)
        slope = factor / both
        ctx.apart, kept = joined is not None, outputs if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(kept, hidden, B, gram, factor, slope, slope * length / most * limit**2)
        return new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        outputs, hidden, B, gram, factor, slope, of_outputs = ctx.saved_tensors
        with without_autocast(gradient):
            last, h = B.flatten(end_dim=-3).to(hidden.dtype), by_memory(hidden, ctx.groups, ctx.own).to(gram.dtype)
            given = by_memory(gradient.to(hidden.dtype), ctx.groups, ctx.own)
            back = torch.bmm(given, last.mT).to(gram.dtype) * ctx.scale
            along = (back * h).sum(dim=-1, keepdim=True)
            to_hidden = factor * back - along * slope * torch.bmm(h, gram)
            to_B = torch.bmm((h * (factor * ctx.scale)).to(hidden.dtype).mT, given)
            to_B = to_B.to(gram.dtype) - torch.bmm((h * (along * slope)).mT, h) @ last.to(gram.dtype)
            to_outputs = None
            if outputs is not None:
                slope = by_head(along * of_outputs, outputs.shape[:-1], ctx.own)
                to_outputs = _times(outputs, slope) if ctx.apart else torch.addcmul(gradient, outputs, slope)
                to_outputs = to_outputs.to(outputs.dtype)
        to_hidden, to_joined = to_hidden.to(hidden.dtype), gradient if ctx.apart else None
        return to_outputs, by_head(to_hidden, hidden.shape[:-1], ctx.own), to_B.view(B.shape), to_joined, None, None


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
