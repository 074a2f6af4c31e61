"""``read.py`` by the kernels of ``triton_kernels.py``: one launch forward, two backward, as operations of PyTorch.

:func:`read` reads one memory and :func:`read_bank` a different one for each token, both with gradients;
:func:`add_from_slots_` is for a server. Compilers take the operations as they are, without a break of the graph.
Symbols and axes are those of ``read.py``; S counts the memories of a bank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, no_type_check

import torch
import triton
from torch import Tensor

from prefixmemory._shapes import Float, Int
from prefixmemory.kernels import triton_kernels as kernels
from prefixmemory.kernels.impl import KINDS, NORMS, Product, padded

_TRITON = {
    torch.float32: triton.language.float32,
    torch.bfloat16: triton.language.bfloat16,
    torch.float16: triton.language.float16,
}
#: Programs in which sums over all tokens are taken.
_PARTS = 512
#: Up to so many tokens, each that may have a slot of its own has a program of its own.
FEW = 512


class Bank(NamedTuple):
    """What differs from memory to memory beside its tensors, as data of the device; ``[S]`` each.

    Attributes:
        tightness: t = 1/c², 0 without a limit, float32.
        scale: s, float32.
        form: φ by the place of its map in ``KINDS`` · 3 + that of its normalisation in ``NORMS``.
    """

    tightness: Float[Tensor, " S"]
    scale: Float[Tensor, " S"]
    form: Int[Tensor, " S"]

    @classmethod
    def of(
        cls, limits: Sequence[float | None], scales: Sequence[float], forms: Sequence[tuple[str, str]],
        device: torch.device,
    ) -> Bank:  # fmt: skip
        """From limits, scales and the names of feature maps and normalisations."""
        return cls(
            torch.tensor([_tightness(limit) for limit in limits], dtype=torch.float32, device=device),
            torch.tensor(scales, dtype=torch.float32, device=device),
            torch.tensor([3 * KINDS.index(name) + NORMS.index(norm) for name, norm in forms], device=device),
        )


def read(
    query: Float[Tensor, "*b h d"],
    outputs: Float[Tensor, "*b h v"],
    product: Product,
    limit: float | None = None,
    scale: float = 1.0,
    onto: Float[Tensor, "*b h v"] | None = None,
) -> Float[Tensor, "*b h v"]:
    """As :func:`prefixmemory.kernels.read.read`, in the dtype of ``onto``, or else ``outputs``."""
    if product.form is None:
        groups, dtype = len(product.factors[0]), product.factors[0].dtype
        query = product.phi(query.to(dtype).unflatten(-2, (groups, -1))).flatten(-3, -2)
    name, norm = product.form or ("identity", "none")
    A, B = (*product.factors, None)[:2]
    A, B, mean = (None if x is None else x[None] for x in (A, B, product.mean))  # a bank of one
    new: Tensor = torch.ops.prefixmemory.read(
        _flat(query), _flat(outputs), None if onto is None else _flat(onto), A, B, mean, [],
        _tightness(limit), scale, KINDS.index(name), NORMS.index(norm), _dot_dtype(product.factors[0]),
    )  # fmt: skip
    return new.view(outputs.shape)


def read_bank(
    query: Float[Tensor, "*b h d"],
    outputs: Float[Tensor, "*b h v"],
    factors: Sequence[Tensor],
    slots: Int[Tensor, "*b"],
    bank: Bank,
    mean: Float[Tensor, "S g f"] | None = None,
) -> Float[Tensor, "*b h v"]:
    """As :func:`read`, with the memory in its slot for each token; tokens of slot -1 stay as they are.

    Args:
        query, outputs: of all tokens.
        factors: ``(M,)`` or ``(A, B)`` of all memories, ``[S, g, f, v]``, or ``[S, g, f, r]`` and ``[S, g, r, v]``.
        slots: of each token; where a row of tokens has one, ``slots[:, None].expand(-1, tokens)``.
        bank: what else differs from memory to memory.
        mean: μ of each.
    """
    A, B = (*factors, None)[:2]
    places = _flat(slots[..., None, None])[..., 0, 0]
    new: Tensor = torch.ops.prefixmemory.read(
        _flat(query), _flat(outputs), None, A, B, mean, [places, *bank], 0.0, 1.0, 0, 0, _dot_dtype(factors[0])
    )
    return new.view(outputs.shape)


def add_from_slots_(
    outputs: Float[Tensor, "t h v"],
    rotated: Float[Tensor, "t h d"],
    content: Float[Tensor, "t h d"],
    A: Float[Tensor, "S h d r"],
    B: Float[Tensor, "S h r v"],
    constant: Float[Tensor, "S h r"],
    rotary: Tensor,
    slots: Int[Tensor, " t"],
    scales: Float[Tensor, " t"],
    bank: Bank,
) -> None:
    """Add in place to the heads' ``outputs`` what the memories in the tokens' slots answer, without gradients.

    Args:
        outputs: of attention.
        rotated, content: the queries after and before rotation.
        A, B: views of any strides, but rows are contiguous.
        constant: μᵀA.
        rotary: ``[S]``, whether a memory reads the rotated query.
        slots: of each token, -1: none.
        scales: of each token, NaN: its memory's own.
        bank: what else differs from memory to memory.
    """
    outputs, rotated, content = outputs[None], rotated[None], content[None]
    plan = _Plan(rotated, outputs, A, B, constant, [slots[None], *bank], 0, 0, A.dtype)
    plan.launch(
        kernels.forward, rotated, *rotated.stride(), content, *content.stride(), outputs, *outputs.stride(),
        outputs, *outputs.stride(), outputs, *outputs.stride(), *plan.factors, *plan.slots,
        *plan.limits, plan.form, rotary, scales, plan.tokens, plan.length, 0.0, 1.0,
        CENTRE=2, LIMIT=True, ONTO=False, SERVED=True,
    )  # fmt: skip


class _Plan:
    """How a read is launched: the grid, sizes, and arguments that several kernels have."""

    def __init__(
        self, query: Tensor, outputs: Tensor, A: Tensor, B: Tensor | None, mean: Tensor | None, bank: list[Tensor],
        kind: int, norm: int, dot: torch.dtype,
    ) -> None:  # fmt: skip
        batch, self.length, self.heads, width = query.shape
        self.memories, self.groups, _, rank = A.shape
        self.tokens = batch * self.length
        repeat, size = self.heads // self.groups, outputs.shape[-1]
        rows = padded(repeat)  # the fewest: with 32, backward passes of heads of 128 do not fit into registers
        per_block = 1 if bank and self.tokens <= FEW else rows // repeat
        self.grid = (math.ceil(self.tokens / per_block), self.groups)
        self.sizes: dict[str, Any] = {
            "D": width, "V": size, "R": rank, "D_": padded(width), "V_": padded(size), "R_": padded(rank),
            "ROWS": rows, "TOKENS": per_block, "REPEAT": repeat, "KIND": kind, "NORM": norm,
            "CENTRE": int(mean is not None), "FULL": B is None, "BANK": bool(bank), "DOT": _TRITON[dot],
        }  # fmt: skip
        self.warps = 4 if max(width, size) <= 64 else 8
        # a kernel looks at no pointer that its sizes do not ask for: any will do
        A, second, mean = _inner(A), A if B is None else _inner(B), A[:, :, 0] if mean is None else _inner(mean)
        self.factors = (A, *A.stride()[:3], second, *second.stride()[:3], mean, *mean.stride()[:2])
        slots, *self.limits, self.form = bank or [query] * 4
        self.slots = (slots, *slots.stride()[:2])

    def launch(self, kernel: Any, *args: Any, grid: tuple[int, ...] | None = None, **constants: Any) -> None:
        """Start the programs of ``grid``, on the device of the memory."""
        with torch.cuda.device_of(self.factors[0]):
            kernel[grid or self.grid](*args, **self.sizes | constants, num_warps=self.warps)


@torch.library.custom_op("prefixmemory::read", mutates_args=())
@no_type_check  # else the tests' shape checks would hide the types that make its schema
def _read(
    query: Tensor, outputs: Tensor, onto: Tensor | None, A: Tensor, B: Tensor | None, mean: Tensor | None,
    bank: list[Tensor], tight: float, scale: float, kind: int, norm: int, dot: torch.dtype,
) -> Tensor:  # fmt: skip
    """What :func:`read` and :func:`read_bank` return; ``bank``: slots and the fields of :class:`Bank`, or empty."""
    base = outputs if onto is None else onto
    new = _empty(base)
    if new.numel() == 0:
        return new
    plan = _Plan(query, outputs, A, B, mean, bank, kind, norm, dot)
    plan.launch(
        kernels.forward, query, *query.stride(), query, *query.stride(), outputs, *outputs.stride(),
        base, *base.stride(), new, *new.stride(), *plan.factors, *plan.slots, *plan.limits, plan.form, query, query,
        plan.tokens, plan.length, tight, scale,
        LIMIT=bool(bank) or tight > 0, ONTO=onto is not None, SERVED=False,
    )  # fmt: skip
    return new


@_read.register_fake  # type: ignore[untyped-decorator]
def _(query: Tensor, outputs: Tensor, onto: Tensor | None, *others: Any) -> Tensor:
    return _empty(outputs if onto is None else onto)


@torch.library.custom_op("prefixmemory::read_backward", mutates_args=())
@no_type_check  # else the tests' shape checks would hide the types that make its schema
def _read_backward(
    gradient: Tensor, is_onto: bool, learns: bool, query: Tensor, outputs: Tensor, A: Tensor, B: Tensor | None,
    mean: Tensor | None, bank: list[Tensor], tight: float, scale: float, kind: int, norm: int, dot: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """∂query, ∂outputs (without what ``onto`` gets, if ``is_onto``) and, if the memory ``learns``, ∂A and ∂B."""
    found = _gradients(query, outputs, A, B, learns)
    if gradient.numel() == 0:
        return [x.zero_() for x in found]
    to_query, to_outputs, *to_factors = found
    plan = _Plan(query, outputs, A, B, mean, bank, kind, norm, dot)
    pairs = torch.empty(plan.tokens, plan.heads, 2, dtype=torch.float32, device=query.device)
    plan.launch(
        kernels.rows_backward, query, *query.stride(), outputs, *outputs.stride(), gradient, *gradient.stride(),
        to_query, *to_query.stride(), to_outputs, *to_outputs.stride(), pairs, *plan.factors,
        *plan.slots, *plan.limits, plan.form, plan.tokens, plan.length, plan.heads, tight, scale,
        LIMIT=bool(bank) or tight > 0, ONTO=is_onto,
    )  # fmt: skip
    if learns:
        per_block = plan.sizes["ROWS"] // plan.sizes["REPEAT"]
        blocks = math.ceil(plan.tokens / per_block)
        parts = min(blocks, math.ceil(_PARTS / (plan.groups * plan.memories)))
        sums = [torch.empty(parts, *x.shape, dtype=torch.float32, device=x.device) for x in to_factors]
        plan.launch(
            kernels.factors_backward, query, *query.stride(), gradient, *gradient.stride(), pairs,
            sums[0], sums[-1], *plan.factors, *plan.slots, plan.form, plan.tokens, plan.length, plan.heads, blocks,
            TOKENS=per_block, grid=(parts, plan.groups, plan.memories),
        )  # fmt: skip
        for to_factor, of_parts in zip(to_factors, sums, strict=True):
            torch.sum(of_parts, dim=0, out=to_factor)
    return found


@_read_backward.register_fake  # type: ignore[untyped-decorator]
def _(
    gradient: Tensor, is_onto: bool, learns: bool, query: Tensor, outputs: Tensor, A: Tensor, B: Tensor | None,
    *others: Any,
) -> list[Tensor]:  # fmt: skip
    return _gradients(query, outputs, A, B, learns)


def _gradients(query: Tensor, outputs: Tensor, A: Tensor, B: Tensor | None, learns: bool) -> list[Tensor]:
    return [_empty(x) for x in (query, outputs, *((A, B) if learns else ())) if x is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, outputs, onto, A, B, mean, bank, *ctx.rest = inputs
    ctx.is_onto = onto is not None
    ctx.save_for_backward(query, outputs, A, B, mean, *bank)  # φ, h and a are computed again


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    query, outputs, A, B, mean, *bank = ctx.saved_tensors
    learns = any(ctx.needs_input_grad[3:5])
    to_query, to_outputs, *to_factors = torch.ops.prefixmemory.read_backward(
        gradient, ctx.is_onto, learns, query, outputs, A, B, mean, bank, *ctx.rest
    )
    to_A, to_B = (*to_factors, None, None)[:2]
    return (to_query, to_outputs, gradient if ctx.is_onto else None, to_A, to_B, None, [None] * len(bank), *[None] * 5)


_read.register_autograd(_backward, setup_context=_keep)


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _tightness(limit: float | None) -> float:
    return 0.0 if limit is None else 1 / limit**2


def _dot_dtype(A: Tensor) -> torch.dtype:
    """Of the factors of products: the memory's, or autocast's."""
    kind = A.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else A.dtype


def _flat(x: Tensor) -> Tensor:
    """``[*b, h, n]`` as ``[batch, length, h, n]``."""
    while x.ndim < 4:
        x = x[None]
    return x.flatten(end_dim=-4)


def _inner(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
