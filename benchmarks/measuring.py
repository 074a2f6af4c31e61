"""Clocks, bytes and tables, the same for all benchmarks."""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.shapes import SHAPES
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefixmemory import set_impl
from prefixmemory.files.records import provenance, write_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "benchmarks"


def options(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", help="of the model; bfloat16 on a card, else float32")
    parser.add_argument("--impl", default="auto", help="what reads a memory: auto, torch or triton")
    parser.add_argument("--shape", choices=SHAPES, default=defaults.pop("shape", "135m"))
    parser.add_argument("--rounds", type=int, default=defaults.pop("rounds", 5))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="tiny shapes and two rounds: whether it runs at all")
    parser.add_argument("--output", type=Path, help="file for the record")
    return parser


def start(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, and PyTorch as they want it."""
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.shape, chosen.rounds = "tiny", 2
    chosen.dtype = chosen.dtype or ("bfloat16" if chosen.device.startswith("cuda") else "float32")
    torch.set_num_threads(1)
    torch.manual_seed(chosen.seed)
    set_impl(chosen.impl)
    return chosen


def conditions(chosen: argparse.Namespace) -> dict[str, Any]:
    """What a record says of how it was made."""
    said = {name: value for name, value in vars(chosen).items() if not isinstance(value, Path)}
    return {"options": said, **provenance()}


def run(part: Any) -> None:
    """A benchmark by itself: its options, measurement and tables; ``part`` is its module."""
    chosen = part.options()
    made_with = conditions(chosen)
    record = part.measure(chosen)
    print(part.tables(record))
    write(chosen, record, made_with)


def write(chosen: argparse.Namespace, record: Mapping[str, Any], made_with: Mapping[str, Any]) -> None:
    """The record of one benchmark, if a file is given for it."""
    if chosen.output is not None:
        write_json(chosen.output, {**record, **made_with})


# Time


def seconds(function: Callable[[], object], device: torch.device | str, repeats: int = 1) -> float:
    """Of one call, the mean of ``repeats``: CPU seconds of this process, or of the card between two events."""
    if torch.device(device).type != "cuda":
        begun = time.process_time()
        for _ in range(repeats):
            function()
        return (time.process_time() - begun) / repeats
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeats):
        function()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000 / repeats


def in_turn(
    calls: Mapping[str, Callable[[], object]], device: torch.device | str, blocks: int = 10, repeats: int = 2
) -> dict[str, float]:
    """Seconds of each of several short calls: the median of short blocks, in turn, since a machine's speed drifts."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(blocks):
        for name, call in calls.items():
            taken[name].append(seconds(call, device, repeats))
    return {name: statistics.median(found) for name, found in taken.items()}


def middle(values: Sequence[float]) -> dict[str, float]:
    """The median and the middle half."""
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": median, "low": low, "high": high}


def ratios(rounds: Sequence[Mapping[str, Mapping[str, float]]], to: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Of every method, by case, to the method that ``to`` names for the case; each within its round."""
    found: dict[str, dict[str, Any]] = {}
    for method, cases in rounds[0].items():
        for case in cases:
            values = [each[method][case] / each[to[case]][case] for each in rounds]
            found.setdefault(method, {})[case] = middle(values)
    return found


def table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table; a cell is a text, a number, or median and middle half."""

    def cell(value: Any) -> str:
        if isinstance(value, Mapping):
            return f"{value['median']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(cell(row[c]) if c in row else '' for c in columns)} |")
    return "\n".join(lines) + "\n"


# Bytes


def kept_bytes(model: torch.nn.Module, step: Callable[[], Tensor]) -> int:
    """What autograd keeps between forward and backward: distinct storages that are no parameters or buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t.detach()

    with saved_tensors_hooks(pack, lambda t: t):
        loss = step()  # alive while it is counted, so that no address is given twice
    total = sum(kept.values())
    del loss
    return total


def cache_bytes(cache: Any) -> int:
    """Size of the keys and values of a cache."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


class PeakBytes(TorchDispatchMode):
    """Counts the storages that operations return, while they live: the most of them at once.

    What an operation takes and frees within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = id(storage)  # PyTorch has one object for a storage while it lives
                if key not in before and key not in self.live:
                    self.live.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, key, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _freed(self, key: int, size: int) -> None:
        self.live.discard(key)
        self.now -= size


def peak_bytes(step: Callable[[], object], device: torch.device | str) -> int:
    """The most bytes that a step holds at once beside what was there before it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with PeakBytes() as counted:
        step()
    return counted.most
