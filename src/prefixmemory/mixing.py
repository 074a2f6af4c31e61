"""How the answer of a prefix outside the softmax is mixed with the heads' own outputs (step 2 of ``reference.py``)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn


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


def build_mixing(kind: str, heads: int, share: float) -> Mixing | None:
    """The mixing that a config asks for, ``None`` where the answer is added as it is."""
    return None if kind == "none" else Mixing(kind, heads, share)
