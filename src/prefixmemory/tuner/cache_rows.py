"""Where the sequences of a cache begin to speak moves with its rows: beam search and callers reorder, choose and repeat
them, and transformers' caches know nothing of what is kept beside."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from prefixmemory.tuner.activation import OF_CACHE
from prefixmemory.tuner.active_tokens import Places

#: Method of a cache -> what becomes of a tensor with a row for each of its sequences.
MOVES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "reorder_cache": lambda rows, order: rows.index_select(0, order.to(rows.device)),
    "batch_select_indices": lambda rows, chosen: rows.index_select(0, chosen.to(rows.device)),
    "batch_repeat_interleave": lambda rows, times: rows.repeat_interleave(times, dim=0),
}


def teach_caches() -> None:
    """Let caches take their places along; once in a process."""
    for kind in (Cache, EncoderDecoderCache):
        for name, move in MOVES.items():
            setattr(kind, name, _moving(getattr(kind, name), move))


def _moving(original: Callable[..., Any], move: Callable[[Tensor, Any], Tensor]) -> Callable[..., Any]:
    @wraps(original)
    def moved(self: Any, *args: Any, **kwargs: Any) -> Any:
        found: dict[Any, Places] = self.__dict__.get(OF_CACHE) or {}
        if found:
            (by,) = (*args, *kwargs.values())
            rows = {invocation: places.moved(lambda x: move(x, by)) for invocation, places in found.items()}
            setattr(self, OF_CACHE, rows)
        return original(self, *args, **kwargs)

    return moved
