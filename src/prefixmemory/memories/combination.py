"""How an answer joins the heads' outputs: mixed with them (step 2 of ``reference.py``), or limited by their length."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from prefixmemory._shapes import Float

TINY = 1e-12  # a squared length that is nothing: keeps the root away from 0, where it has no slope


class Mixing(nn.Module):
    """λ·o + (1 − λ)·answer, with λ = sigmoid(logit); a learned logit is one a layer or one a head.

    Args:
        kind: ``fixed``, ``layer`` or ``head``.
        heads: number of query heads.
        share: λ, in (0, 1); the start value of a learned one.
    """

    def __init__(self, kind: str, heads: int, share: float) -> None:
        super().__init__()
        self.fixed = share if kind == "fixed" else None
        if self.fixed is None:
            logit = torch.full((heads if kind == "head" else 1,), math.log(share / (1 - share)))
            self.logit = nn.Parameter(logit)

    def forward(
        self, answer: Float[Tensor, "*batch h v"], outputs: Float[Tensor, "*batch h v"]
    ) -> Float[Tensor, "*batch h v"]:
        """What is added to the heads' ``outputs``: (1 − λ)·(answer − outputs)."""
        rest = torch.sigmoid(-self.logit)[:, None] if self.fixed is None else 1 - self.fixed
        return rest * (answer - outputs.to(answer.dtype))


class AnswerLimit(nn.Module):
    """answer / √(1 + |answer|² / (c·|o|)²): short answers pass as they are, long ones come near the length c·|o|.

    No step of the optimiser can then drown what a head says by itself, whatever the learning rate and the head's scale
    (``docs/LOG.md``). The function is ``reference.limited``.

    Args:
        limit: c, the length that no answer reaches, in lengths of the head's own output o for that token.
    """

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(
        self, answer: Float[Tensor, "*batch h v"], outputs: Float[Tensor, "*batch h v"]
    ) -> Float[Tensor, "*batch h v"]:
        """What is added to the heads' ``outputs``."""
        exact = answer.float()  # in float16 squares overflow, and a small factor is 0
        longest = self.limit**2 * outputs.float().pow(2).mean(dim=-1, keepdim=True) + TINY
        length = exact.pow(2).mean(dim=-1, keepdim=True)
        return (exact * (longest / (longest + length)).sqrt()).to(answer.dtype)


def build_mixing(kind: str, heads: int, share: float, limit: float | None = None) -> Mixing | AnswerLimit | None:
    """What a config asks for; ``None`` where the answer is added as it is. ``limit`` goes with ``kind="none"`` only."""
    if limit is not None:
        return AnswerLimit(limit)
    return None if kind == "none" else Mixing(kind, heads, share)
