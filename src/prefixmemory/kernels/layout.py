"""Where the vectors of heads lie for products with memories: from ``[*b, h, n]`` to the rows of each memory, and back.

``g`` memories, of which each of ``own`` batch rows may have its own; h is a multiple of g: head n is that of memory
n // (h / g).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def by_memory(x: Tensor, groups: int, own: int = 1) -> Tensor:
    """``[own * g, rows, n]``: the vectors that meet the same memory side by side; a view where each has one head."""
    heads, size = x.shape[-2:]
    apart = x.reshape(own, -1, groups, heads // groups, size)
    return apart.transpose(1, 2).reshape(own * groups, -1, size)


def by_head(rows: Tensor, shape: Any, own: int = 1) -> Tensor:
    """The way back, to the axes ``shape``, ``[*b, h]``."""
    groups, size = len(rows) // own, rows.shape[-1]
    apart = rows.reshape(own, groups, -1, shape[-1] // groups, size)
    return apart.transpose(1, 2).reshape(*shape, size)
