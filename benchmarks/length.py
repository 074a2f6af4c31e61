"""What a text in front costs: reading it, each token decoded behind it, and what is held meanwhile.

    python -m benchmarks.length                                # prints a table
    python -m benchmarks.length --shape 8b --layers 32 --device cuda

A model of two of SmolLM2's 30 layers and a vocabulary of 1,024, so that the output head counts for nothing: more does
not fit into minutes of one core at 32,768 tokens. ``memory, activated`` leaves the text to the base model, whose cache
every adapter goes on from: ``a second adapter`` is what is left to do for one more, copying the cache and reading
``PROMPT`` tokens. All others read the text again for each adapter. A prompt of ``SHOTS`` examples of 60 tokens stands
in front of the text. Bytes are those of the cache's keys and values and of the adapter, for all layers of the shape.
Memories are compared with ``reference.py`` at the shortest length before anything is timed.
"""

from __future__ import annotations

import copy
import statistics
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from benchmarks import measuring, shapes
from benchmarks.shapes import BARE, MEMORY

from prefixmemory.tuner.layers import memory_layers

ACTIVATED, SECOND = "memory, activated", "a second adapter, activated"
METHODS = (BARE, MEMORY, ACTIVATED, "LoRA q, v r=8", "LoRA all linear r=16", "prefix tuning, 32 tokens")
SHOTS, PROMPT = 16, 16
SHOT = f"{SHOTS} examples in the prompt"


class Reader:
    """One method's model: it reads a text, and decodes behind it."""

    def __init__(self, base: Any, method: str, of: Any, chosen: Namespace) -> None:
        self.method = method
        self.model = shapes.with_method(base, BARE if method == SHOT else method)
        said = torch.randint(3, of.vocab_size, (1, PROMPT + SHOTS * 60), device=chosen.device)
        said[:, :2] = torch.tensor(shapes.INVOCATION)
        self.prompt, self.examples = said[:, :PROMPT], said[:, PROMPT:] if method == SHOT else None
        self.adapter = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        self.inner = self.model.get_base_model() if method.startswith("prefix") else self.model

    @torch.no_grad()
    def read(self, ids: Any) -> Any:
        """The cache of a text."""
        if self.examples is not None:
            ids = torch.cat((self.examples, ids), dim=1)
        if self.method != ACTIVATED:
            return self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        with self.model.disable_adapter():
            return self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    @torch.no_grad()
    def go_on(self, cache: Any) -> Any:
        """The cache with the prompt, which the adapter reads."""
        return self.inner(input_ids=self.prompt, past_key_values=cache, logits_to_keep=1).past_key_values

    def decoding(self, cache: Any) -> Callable[[], Any]:
        @torch.no_grad()
        def step() -> Any:
            return self.inner(input_ids=self.prompt[:, -1:], past_key_values=cache)

        return step


def first(reader: Reader, ids: Any, device: str) -> tuple[Any, dict[str, dict[str, float]]]:
    """The cache of a text and the prompt behind it, with the seconds that reading took, and bytes."""
    read: list[Any] = []
    seconds = measuring.seconds(lambda: read.append(reader.read(ids)), device)
    cache = read[0]
    taken = {reader.method: {"read": seconds, "cache": measuring.cache_bytes(cache), "adapter": reader.adapter}}
    if reader.method == ACTIVATED:
        taken[SECOND] = {"read": measuring.seconds(lambda: reader.go_on(copy.deepcopy(cache)), device)}
    return reader.go_on(cache), taken


def at(readers: Sequence[Reader], ids: Any, device: str) -> dict[str, dict[str, float]]:
    """Seconds of each method behind ``ids``, and bytes."""
    taken: dict[str, dict[str, float]] = {}
    steps = {}
    for reader in readers:
        cache, found = first(reader, ids, device)
        taken |= found
        steps[reader.method] = reader.decoding(cache)
    for method, seconds in measuring.in_turn(steps, device, blocks=40, repeats=1).items():
        taken[method]["token"] = seconds
    return taken


def measure(chosen: Namespace) -> dict[str, Any]:
    """By length and method: seconds of reading and of a token, bytes, and ratios to the bare model."""
    of = shapes.config(chosen.shape, chosen.layers, positions=2 * max(chosen.lengths))
    depth = shapes.config(chosen.shape).num_hidden_layers
    of.vocab_size = min(of.vocab_size, 1024)
    base = shapes.base_model(of, getattr(torch, chosen.dtype), chosen.device)
    readers = [Reader(base, method, of, chosen) for method in (*METHODS, SHOT)]
    text = torch.randint(3, of.vocab_size, (1, max(chosen.lengths)), device=chosen.device)
    shortest = text[:, : min(chosen.lengths)]
    for reader in readers:
        cache = reader.read(shortest)  # warm-up
        if memory_layers(reader.model):
            if reader.method == MEMORY:
                shapes.check(reader.model, lambda r=reader: r.read(shortest))  # type: ignore[misc]
            shapes.check(reader.model, lambda r=reader, c=cache: r.go_on(c))  # type: ignore[misc]
            shapes.check(reader.model, reader.decoding(cache))
    found: dict[str, Any] = {}
    for length in chosen.lengths:
        rounds = max(1, min(chosen.rounds, chosen.rounds * 4096 // length))
        taken = [at(readers, text[:, :length], chosen.device) for _ in range(rounds)]
        found[str(length)] = {method: _row(method, taken, depth / of.num_hidden_layers) for method in taken[0]}
        print(f"length: {length} tokens in front, {rounds} round(s)", file=sys.stderr, flush=True)
    return {"layers": of.num_hidden_layers, "of": depth, "lengths": found}


def _row(method: str, taken: Sequence[Mapping[str, Mapping[str, float]]], layers: float) -> dict[str, float]:
    """Medians of the rounds; bytes times ``layers``."""
    row = {}
    for key in ("read", "token"):
        if key in taken[0][method]:
            row[f"{key}, s"] = statistics.median(each[method][key] for each in taken)
            row[f"{key}, ratio to bare"] = statistics.median(each[method][key] / each[BARE][key] for each in taken)
    for key in ("cache", "adapter"):
        if key in taken[0][method]:
            row[f"{key}, MiB"] = taken[0][method][key] / 2**20 * layers
    return row


def tables(record: Mapping[str, Any]) -> str:
    """What a record says, in Markdown."""
    return "\n".join(measuring.table(f"{length} tokens in front", rows) for length, rows in record["lengths"].items())


def options(arguments: Sequence[str] | None = None) -> Namespace:
    parser = measuring.options(__doc__, rounds=3)
    parser.add_argument("--layers", type=int, default=2, help="of the model that is measured")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(10, 16)])
    chosen = measuring.start(parser, arguments)
    if chosen.quick:
        chosen.lengths = [16, 64]
    return chosen


if __name__ == "__main__":
    measuring.run(sys.modules[__name__])
