"""What belongs to one call of an attention module, or of the model: one object per call and thread.

An attention module opens a :class:`Call` when it is entered and closes it when it is left, also by an exception. In
between, the query's projection, the attention function and the output projection find it as the thread's innermost
one. Layers hold nothing of it, so that threads, nested calls, checkpointing and copies never meet.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prefixmemory.errors import PrefixMemoryError


class RowAdapters:
    """An adapter for each row of a batch: ``adapter_names`` of one forward pass or generation.

    Attributes:
        layers: those of the model that is called; other models that run meanwhile have rows of their own.
        names: one adapter for each row that the caller gave.
        beams: how many rows generate() makes of each; batches have this many times more rows than there are names.
        plans: what each layer has to do for these adapters.
        stacks: of a plan, its memories as one; ``by_row.py`` keeps them here.
    """

    def __init__(self, names: Sequence[str], layers: Iterable[nn.Module]) -> None:
        self.layers = frozenset(layers)
        self.names, self.beams = list(names), 1
        self.distinct = list(dict.fromkeys(self.names))
        self.plans: dict[nn.Module, Any] = {}
        self.stacks: dict[Any, Any] = {}
        self._of_batch: dict[tuple[int, torch.device], Groups] = {}

    def check(self, batch: int) -> None:
        """Refuse a batch with another number of rows.

        Raises:
            PrefixMemoryError: names both numbers.
        """
        if batch not in (len(self.names), len(self.names) * self.beams):
            raise PrefixMemoryError(
                f"adapter_names has {len(self.names)} entries for a batch of {batch} rows: give one per row."
            )

    def groups(self, batch: int, device: torch.device) -> Groups:
        """The rows of each adapter in a batch of ``batch`` rows; worked out once."""
        found = self._of_batch.get((batch, device))
        if found is None:
            self.check(batch)
            found = self._of_batch[batch, device] = Groups(self.names, batch // len(self.names), device)
        return found


class Groups:
    """The rows of a batch sorted by adapter.

    Attributes:
        slices: for each adapter, its first and one past its last row in the sorted batch.
        order: ``[batch]``, which row of the batch comes where; ``None``: the batch is sorted already.
        back: the inverse of ``order``.
        row: for each row of the batch, its adapter.
    """

    def __init__(self, names: Sequence[str], beams: int, device: torch.device) -> None:
        self.row = [name for name in names for _ in range(beams)]
        by_name: dict[str, list[int]] = {}
        for index, name in enumerate(self.row):
            by_name.setdefault(name, []).append(index)
        order = [index for rows in by_name.values() for index in rows]
        self.slices: list[tuple[str, int, int]] = []
        start = 0
        for name, rows in by_name.items():
            self.slices.append((name, start, start + len(rows)))
            start += len(rows)
        self._has: dict[str, Tensor] = {}
        self._places: dict[tuple[str, ...], Tensor] = {}
        self._index: dict[tuple[str, ...], Tensor | None] = {}
        self.order: Tensor | None = None
        self.back: Tensor | None = None
        if order != sorted(order):
            self.order = torch.tensor(order, device=device)
            self.back = self.order.argsort()
        self.device = device

    def has(self, name: str) -> Tensor:
        """Which rows have the adapter ``name``, bool ``[batch]``."""
        if name not in self._has:
            self._has[name] = torch.tensor([row == name for row in self.row], device=self.device)
        return self._has[name]

    def places(self, names: tuple[str, ...]) -> Tensor:
        """For each row of the batch, the place of its adapter in ``names``, int64 ``[batch]``; -1: none of them."""
        if names not in self._places:
            found = [names.index(row) if row in names else -1 for row in self.row]
            self._places[names] = torch.tensor(found, device=self.device)
        return self._places[names]

    def index_of(self, names: tuple[str, ...]) -> Tensor | None:
        """Which rows have one of the adapters ``names``, int64; ``None``: all have."""
        if names not in self._index:
            found = [place for place, row in enumerate(self.row) if row in names]
            all_have = len(found) == len(self.row)
            self._index[names] = None if all_have else torch.tensor(found, device=self.device)
        return self._index[names]


class Call:
    """One call of an attention module.

    Attributes:
        layer: the memory layer that hangs in it.
        plan: what the layer had to do when the call began; ``None``: nothing.
        rows: an adapter for each row, if the caller asked for that.
        outer: the call in which this one was made, if any.
        projected: what the query's source returned and was given, until the query is taken out of it.
        queries: the queries that have been seen, by kind (``content``, ``rotary``), not yet read.
        was_read: whether the output projection was reached.
        was_inside: whether the attention function was reached through transformers' interface.
    """

    __slots__ = ("layer", "outer", "plan", "projected", "queries", "rows", "was_inside", "was_read")

    def __init__(self, layer: nn.Module, plan: Any, rows: RowAdapters | None, outer: Call | None) -> None:
        self.layer, self.plan, self.rows, self.outer = layer, plan, rows, outer
        self.projected: tuple[Any, Tensor] | None = None
        self.queries: dict[str, Tensor] = {}
        self.was_read = self.was_inside = False


class _OfThread(threading.local):
    """What the thread is in the midst of; the last four belong to ``activation.py``."""

    def __init__(self) -> None:  # no class attributes: torch.compile would guard that a thread has none of its own
        self.call: Call | None = None
        self.rows: RowAdapters | None = None
        self.model_pass: Any = None
        self.given: Any = None
        self.prompt: Any = None
        self.unfinished = False


thread = _OfThread()


def open_call(layer: nn.Module, plan: Any, rows: RowAdapters | None) -> None:
    """The thread enters the attention module of ``layer``."""
    thread.call = Call(layer, plan, rows, thread.call)


def current_call(layer: nn.Module) -> Call | None:
    """The innermost call of the thread, if it is one of ``layer``."""
    call = thread.call
    return call if call is not None and call.layer is layer else None


def close_call(layer: nn.Module) -> Call | None:
    """The thread leaves the attention module of ``layer``; the call that ends, ``None`` if none was opened.

    Calls within it that were broken off past all hooks (Ctrl-C) end too.
    """
    call = thread.call
    while call is not None and call.layer is not layer:
        call = call.outer
    if call is not None:
        thread.call = call.outer
    return call


def row_adapters(*layers: nn.Module) -> RowAdapters | None:
    """The adapters that the thread's current call of a model gives to its rows; with ``layers``, if any of them is one
    of that model's."""
    rows = thread.rows
    return None if rows is None or (layers and rows.layers.isdisjoint(layers)) else rows


@contextmanager
def model_call(rows: RowAdapters | None) -> Iterator[None]:
    """One call of a model: with ``rows``, each row of its batches has its own adapter.

    What Ctrl-C broke off in it ends with it, so that no call holds on to the tensors, and the graph, of a lost step.
    """
    before = thread.call, thread.rows, thread.model_pass
    thread.rows = rows
    try:
        yield
    finally:
        thread.call, thread.rows, thread.model_pass = before
