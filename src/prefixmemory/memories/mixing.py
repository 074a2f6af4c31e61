"""λ·o + (1 − λ)·a: a memory output a mixed with the head's own output o (step 2 of ``reference.py``)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from prefixmemory._shapes import Float

MixingKind = Literal["none", "fixed", "layer", "head"]


class Mixing(nn.Module):
    """λ = sigmoid(logit); a learned logit is one per layer or one per head.

    Args:
        kind: ``fixed``, ``layer`` or ``head``.
        heads: number of query heads.
        mix: λ, in (0, 1); the start value of a learned one.
    """

    def __init__(self, kind: MixingKind, heads: int, mix: float) -> None:
        super().__init__()
        self.fixed = mix if kind == "fixed" else None
        if self.fixed is None:
            logit = torch.full((heads if kind == "head" else 1,), math.log(mix / (1 - mix)))
            self.logit = nn.Parameter(logit)

    def forward(self, answer: Float[Tensor, "*b h v"], outputs: Float[Tensor, "*b h v"]) -> Float[Tensor, "*b h v"]:
        """What is added to the heads' ``outputs``: (1 − λ)·(a − o), with a the memory output ``answer``."""
        rest = torch.sigmoid(-self.logit)[:, None] if self.fixed is None else 1 - self.fixed
        return rest * (answer - outputs.to(answer.dtype))
