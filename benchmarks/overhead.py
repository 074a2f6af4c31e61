"""What memories, LoRA and prefix tuning cost beside the bare model: training step, prefill, decoding, bytes.

    python -m benchmarks.overhead                              # prints tables
    python -m benchmarks.overhead --against OTHER/src          # and those of another checkout, in turn with this one
    python -m benchmarks.overhead --shape 8b --device cuda --tokens 4096 --front 4096 --compiled

A model with random weights, one thread. Every method has a model of its own in one process, all with the same base
weights. A round measures each of them once, in turn; single tokens are decoded in short blocks, in turn too. A ratio is
taken within a round, and tables show the median of the rounds and the middle half of them. Training steps stand beside
the bare model with one trainable bias in its second layer, so that gradients pass through it. ``floor`` is what a
method must cost, see ``shapes.floors``. Before anything is timed, every memory is compared with ``reference.py``,
outputs and gradients, in every layer; a wrong path is not timed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks import measuring, shapes
from benchmarks.shapes import BARE, BIAS, HOOKS, METHODS

from prefixmemory.tuner.layers import memory_layers, reads_by

TRAIN = "training step"
#: Methods that are compiled: each takes more than a minute on a CPU, its training step several.
COMPILED = (BARE, BIAS, "default memory", "LoRA q, v r=8")


class Bench:
    """The models of one checkout, and one measurement of each."""

    def __init__(self, chosen: Namespace) -> None:
        self.device, self.of, self.rows = chosen.device, shapes.config(chosen.shape), chosen.rows
        self.tokens, self.front = chosen.tokens, chosen.front
        self.room = chosen.front + 24 * (chosen.rounds + 2)  # in a static cache, for all that will be decoded
        base = shapes.base_model(self.of, getattr(torch, chosen.dtype), self.device)
        self.ids = shapes.text(self.of, chosen.rows, chosen.tokens, self.device)
        self.prompt = shapes.text(self.of, chosen.rows, chosen.front, self.device)
        self.models = {name: shapes.with_method(base, name) for name in chosen.methods}
        self.read_by = {name: reads_by(model) for name, model in self.models.items() if memory_layers(model)}
        for name, model in self.models.items():
            if memory_layers(model) and name != HOOKS:
                self.check(name, model)
        self.compiled: dict[str, dict[str, Callable[[], Any]]] = {}
        ours = {name: model for name, model in self.models.items() if name in COMPILED}
        if chosen.compiled:
            self.compiled["decode 1, compiled"] = {n: self.decoding_compiled(m) for n, m in ours.items() if n != BIAS}
        if chosen.compiled_training:
            self.compiled[f"{TRAIN}, compiled"] = {
                n: self.training(torch.compile(m)) for n, m in ours.items() if n != BARE
            }

    def check(self, name: str, model: Any) -> None:
        """Compare what is to be timed with the reference."""
        spoken = shapes.spoken_from(self.tokens) if name == "memory, activated" else 0
        shapes.check(model, lambda: self.loss(model.train()), spoken=spoken, learns=True)
        model.eval()
        shapes.check(model, self.prefilling(model), spoken=spoken)
        for rows in (1, self.rows):
            shapes.check(model, self.decoding(model, rows))

    def loss(self, model: Any) -> Any:
        return model(input_ids=self.ids[:1], labels=self.ids[:1], use_cache=False).loss

    def training(self, model: Any) -> Callable[[], None]:
        def step() -> None:
            self.loss(model.train()).backward()
            model.zero_grad(set_to_none=True)
            model.eval()

        return step

    @torch.no_grad()
    def prefill(self, model: Any, ids: Any) -> Any:
        return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    def prefilling(self, model: Any) -> Callable[[], Any]:
        return lambda: self.prefill(model, self.ids[:1])

    def decoding(self, model: Any, rows: int) -> Callable[[], Any]:
        """A call that decodes one token for each of ``rows`` behind a prompt, which is in the cache."""
        cache = self.prefill(model, self.prompt[:rows])
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            model = model.get_base_model()  # the prefix is in the cache

        @torch.no_grad()
        def step() -> Any:
            return model(input_ids=self.prompt[:rows, :1], past_key_values=cache).logits

        return step

    @torch.no_grad()
    def decoding_compiled(self, model: Any) -> Callable[[], Any]:
        """The same of the compiled model with a static cache, for one row; on a card in CUDA graphs."""
        from transformers import StaticCache

        def started() -> Any:
            cache = StaticCache(config=self.of, max_cache_len=self.room)
            model(input_ids=self.prompt[:1], past_key_values=cache, logits_to_keep=1)
            return cache

        cache, graphs = started(), self.device.startswith("cuda")
        compiled = torch.compile(model, mode="reduce-overhead" if graphs else None)

        @torch.no_grad()
        def step() -> Any:
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            return compiled(input_ids=self.prompt[:1, :1], past_key_values=cache).logits

        right = model(input_ids=self.prompt[:1, :1], past_key_values=started()).logits
        error = ((step() - right).abs().max() / right.abs().max()).item()
        if not error < shapes.TOLERANCE[right.dtype]:
            raise SystemExit(f"a compiled model is wrong by {error:.2g}: nothing is timed")
        step()
        return step

    def round(self) -> dict[str, dict[str, float]]:
        """Seconds of every method and case, once."""
        found: dict[str, dict[str, float]] = {name: {} for name in self.models}
        for name, model in self.models.items():
            if name != BARE:
                found[name][TRAIN] = measuring.seconds(self.training(model), self.device)
            if name != BIAS:
                found[name]["prefill"] = measuring.seconds(self.prefilling(model), self.device)
        for rows in (1, self.rows):
            steps = {name: self.decoding(model, rows) for name, model in self.models.items() if name != BIAS}
            for name, taken in measuring.in_turn(steps, self.device).items():
                found[name][f"decode {rows}"] = taken
        for case, steps in self.compiled.items():
            blocks = {"blocks": 1, "repeats": 1} if case.startswith(TRAIN) else {}
            for name, taken in measuring.in_turn(steps, self.device, **blocks).items():
                found[name][case] = taken
        return found

    def bytes(self) -> dict[str, dict[str, int]]:
        """Of a training step: what autograd keeps, and the most that is held at once beside the weights."""
        found = {}
        for name, model in self.models.items():
            if name != BARE:
                kept = measuring.kept_bytes(model.train(), lambda m=model: self.loss(m))
                found[name] = {"kept": kept, "peak": measuring.peak_bytes(self.training(model), self.device)}
        return found

    def floors(self) -> dict[str, dict[str, float]]:
        return {
            name: shapes.floors(model, name, self.of, self.tokens, self.front, self.rows)
            for name, model in self.models.items()
            if name not in (BARE, BIAS)
        }


class Elsewhere:
    """The same of another checkout, in a process of its own."""

    def __init__(self, source: Path, arguments: Sequence[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(source), str(measuring.ROOT)))}
        command = [sys.executable, "-m", "benchmarks.overhead", "--serve", *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.round()  # warm-up

    def round(self) -> dict[str, dict[str, float]]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the other checkout's process ended: see above")
        return json.loads(line)  # type: ignore[no-any-return]


def measure(chosen: Namespace, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Seconds, ratios, bytes and floors of every method and case."""
    bench = Bench(chosen)
    benches: dict[str, Bench | Elsewhere] = {"this checkout": bench}
    if chosen.against:
        benches["the other one"] = Elsewhere(chosen.against, arguments)
    sizes = bench.bytes()  # it warms up, too
    rounds: dict[str, list[Any]] = {name: [] for name in benches}
    for number in range(chosen.rounds):
        for name, each in benches.items():
            rounds[name].append(each.round())
        print(f"overhead: round {number + 1} of {chosen.rounds}", file=sys.stderr, flush=True)
    found = {name: _ratios(taken) for name, taken in rounds.items()}
    floors = bench.floors()
    return {"ratios": found, "floors": floors, "bytes": sizes, "read_by": bench.read_by, "seconds": rounds}


def _ratios(rounds: list[Any]) -> dict[str, dict[str, Any]]:
    """To the bare model, with the bias where it learns."""
    cases = {case for found in rounds[0].values() for case in found}
    found = measuring.ratios(rounds, {case: BIAS if case.startswith(TRAIN) else BARE for case in cases})
    return {name: row for name, row in found.items() if name not in (BARE, BIAS)}


def tables(record: Mapping[str, Any]) -> str:
    """What a record says, in Markdown."""
    parts = [measuring.table(f"{name}, ratio to bare", rows) for name, rows in record["ratios"].items()]
    parts.append(measuring.table("floor of the ratio", record["floors"]))
    mebibytes = {n: {f"{k}, MiB": b / 2**20 for k, b in sizes.items()} for n, sizes in record["bytes"].items()}
    parts.append(measuring.table("a training step", mebibytes))
    return "\n".join(parts)


def options(arguments: Sequence[str] | None = None) -> Namespace:
    parser = measuring.options(__doc__, rounds=4)
    parser.add_argument("--against", type=Path, help="src folder of another checkout")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--tokens", type=int, default=512, help="of a training step and a prefill")
    parser.add_argument("--front", type=int, default=64, help="tokens in the cache when one is decoded")
    parser.add_argument("--rows", type=int, default=8, help="of the larger batch that is decoded")
    parser.add_argument("--compiled", action="store_true", help="decode with compiled models too")
    parser.add_argument("--compiled-training", action="store_true", help="and take training steps with them")
    parser.add_argument("--serve", action="store_true", help="measure a round for every line on standard input")
    chosen = measuring.start(parser, arguments)
    if chosen.quick:
        chosen.tokens, chosen.front = 16, 16
    chosen.methods = list(dict.fromkeys([BARE, BIAS, *chosen.methods]))
    return chosen


def main() -> None:
    chosen = options()
    if chosen.serve:
        bench = Bench(chosen)
        for _ in sys.stdin:
            print(json.dumps(bench.round()), flush=True)
        return
    made_with = measuring.conditions(chosen)  # now: the checkout may be another one in the end
    record = measure(chosen, _without_against(sys.argv[1:]))
    if chosen.against:
        commit = subprocess.run(["git", "-C", chosen.against, "rev-parse", "HEAD"], capture_output=True, text=True)
        record["against_commit"] = commit.stdout.strip()
    print(tables(record))
    measuring.write(chosen, record, made_with)


def _without_against(arguments: list[str]) -> list[str]:
    place = arguments.index("--against") if "--against" in arguments else len(arguments)
    return arguments[:place] + arguments[place + 2 :]


if __name__ == "__main__":
    main()
