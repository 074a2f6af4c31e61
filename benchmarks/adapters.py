"""What many adapters cost: one for each row of a batch, switching, loading.

    python -m benchmarks.adapters                              # prints tables
    python -m benchmarks.adapters --shape 8b --device cuda --rows 8 64

Rows: a batch in which every row has an adapter of its own (``adapter_names=``) beside the same batch with one adapter,
in turn, as in ``overhead.py``; memories are compared with ``reference.py`` row by row before. Switching and loading:
memories and LoRA of an 8B model's shape, whose own weights take no room. Loading stands beside reading: the same
file's tensors, each copied into memory of its own, from a warm page cache. Compilations: how often ``torch.compile``
starts again when adapters are switched or scaled, on a model of two layers.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks import measuring, shapes
from benchmarks.shapes import MEMORY, METHODS
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from prefixmemory import set_scale
from prefixmemory.serving.bank import LayerBank, Step
from prefixmemory.serving.served import HeadSizes, read_memory
from prefixmemory.tuner.layers import memory_layers

FULL, LORA_QV, LORA = "memory in full", "LoRA q, v r=8", "LoRA all linear r=16"
IN_ROWS = (MEMORY, FULL, LORA_QV)
LOADED = {MEMORY: (1, 8, 64), FULL: (1, 8, 64), LORA: (1, 8)}


# An adapter for each row


class Rows:
    """One model with as many adapters as rows."""

    def __init__(self, base: nn.Module, of: Any, method: str, rows: int, chosen: Namespace) -> None:
        self.names = [f"adapter{number}" for number in range(rows)]
        self.model: Any = shapes.with_method(base, method)
        make = METHODS[method]
        assert make is not None
        for name in self.names:
            self.model.add_adapter(name, make())
        shapes.as_if_trained(self.model)
        self.model.eval()
        self.ids = shapes.text(of, rows, chosen.tokens, chosen.device)
        self.prompt = self.ids[:, : chosen.front]
        if memory_layers(self.model):
            for call in (self.prefill("each"), self.decoding("each")):
                shapes.check(self.model, call, names=self.names)

    def keywords(self, case: str) -> dict[str, Any]:
        """For a row's own adapter each, or the first one, named in the same way or active for all."""
        own = {"each": self.names, "one, named": self.names[:1] * len(self.names)}
        return {"adapter_names": own[case]} if case in own else {}

    def prefill(self, case: str) -> Callable[[], Any]:
        @torch.no_grad()
        def call() -> Any:
            return self.model(input_ids=self.ids, use_cache=False, logits_to_keep=1, **self.keywords(case))

        return call

    @torch.no_grad()
    def decoding(self, case: str) -> Callable[[], Any]:
        keywords = self.keywords(case)
        cache = self.model(input_ids=self.prompt, use_cache=True, logits_to_keep=1, **keywords).past_key_values

        @torch.no_grad()
        def step() -> Any:
            return self.model(input_ids=self.prompt[:, :1], past_key_values=cache, **keywords)

        return step

    def round(self, device: str) -> dict[str, dict[str, float]]:
        """Seconds of both kinds of batch."""
        cases = ("one", "one, named", "each")
        found = {case: {"prefill": measuring.seconds(self.prefill(case), device)} for case in cases}
        for case, taken in measuring.in_turn({case: self.decoding(case) for case in cases}, device).items():
            found[case]["decode"] = taken
        return found


def in_rows(chosen: Namespace) -> dict[str, Any]:
    """Ratios of a batch with an adapter for each row to one with a single adapter, by method and number of rows."""
    of = shapes.config(chosen.shape)
    base = shapes.base_model(of, getattr(torch, chosen.dtype), chosen.device)
    found: dict[str, Any] = {}
    for rows in chosen.rows:
        for method in IN_ROWS:
            batch = Rows(base, of, method, rows, chosen)
            batch.round(chosen.device)  # warm-up
            rounds = [batch.round(chosen.device) for _ in range(chosen.rounds)]
            ratios = measuring.ratios(rounds, {"prefill": "one", "decode": "one"})
            found[f"{method}, {rows} rows"] = {
                f"{case}, {kind}": ratios[kind][case]
                for case in ("decode", "prefill")
                for kind in ("each", "one, named")
            }
            print(f"adapters: {method} in {rows} rows", file=sys.stderr, flush=True)
    return found


# Switching and loading


def hollow(shape: str) -> Any:
    """A model whose weights are one number each, seen at their shapes: real, and as good as empty."""
    model = shapes.base_model(shapes.config(shape), torch.bfloat16, "meta")
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            one = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(one, requires_grad=False))
    return model


@contextmanager
def saved(method: str, shape: str) -> Iterator[tuple[Any, Path]]:
    """A hollow model with an adapter, and the folder that this is saved in."""
    make = METHODS[method]
    assert make is not None
    with tempfile.TemporaryDirectory() as folder:
        model: Any = get_peft_model(hollow(shape), make())
        shapes.as_if_trained(model)
        model.save_pretrained(folder)
        yield model, Path(folder)


def loaded(
    folder: Path, numbers: Sequence[int], load: Callable[[int], Any], switch: Callable[[int], float]
) -> dict[int, dict[str, float]]:
    """CPU seconds of the n-th ``load`` and of reading the file; milliseconds of ``switch``, to one among n."""
    file, found = folder / "adapter_model.safetensors", {}
    for number in range(1, max(numbers) + 1):
        taken = measuring.seconds(partial(load, number), "cpu")
        if number in numbers:
            reading = partial(_read, file)
            read = statistics.median(measuring.seconds(reading, "cpu") for _ in range(5))
            switching = statistics.median(switch(other) for other in range(max(1, number - 5), number + 1))
            found[number] = {
                "file, MB": file.stat().st_size / 1e6, "load, s": taken, "read, s": read,
                "load / read": taken / read, "switch, ms": 1000 * switching,
            }  # fmt: skip
            print(f"adapters: {number} loaded", file=sys.stderr, flush=True)
    return found


def _read(file: Path) -> list[Tensor]:
    return [tensor.clone() for tensor in load_file(file).values()]


def into_model(method: str, numbers: Sequence[int], shape: str) -> dict[str, dict[str, float]]:
    """By ``load_adapter``; a switch is ``set_adapter``."""
    with saved(method, shape) as (model, folder):

        def load(number: int) -> None:
            model.load_adapter(folder, f"adapter{number}", torch_device="cpu")

        found = loaded(folder, numbers, load, partial(_switch, model))
    return {f"{method}, n={number}": row for number, row in found.items()}


def into_slots(numbers: Sequence[int], shape: str) -> dict[str, dict[str, float]]:
    """Into a server's slots (``serving/bank.py``), checked; a switch is another index for all rows."""
    of, cpu, rows = shapes.config(shape), torch.device("cpu"), 8
    heads, size, layers = of.num_attention_heads, of.head_dim, of.num_hidden_layers
    sizes = HeadSizes(heads, of.num_key_value_heads, size, size)
    banks = [LayerBank(max(numbers), 8, heads, size, size, torch.float32, cpu) for _ in range(layers)]
    step = Step(rows, heads * size, torch.float32, cpu)
    with saved(MEMORY, shape) as (_, folder):

        def load(number: int) -> None:
            for place, layer in read_memory(folder, sizes, layers, 8).items():
                banks[place].put(number - 1, layer)

        def switch(number: int) -> float:
            slots = torch.full((rows,), number - 1)
            return measuring.seconds(lambda: step.point(slots), "cpu")

        found = loaded(folder, numbers, load, switch)
    return {f"{MEMORY}, a server's slot {number}": row for number, row in found.items()}


def _switch(model: Any, other: int) -> float:
    """Seconds of making an adapter active while another one is."""
    model.set_adapter("default")
    return measuring.seconds(lambda: model.set_adapter(f"adapter{other}"), "cpu")


# Compiling again


def graphs(method: str, adapters: int, below: bool) -> dict[str, int]:
    """How many graphs ``torch.compile`` makes, by what is done to a compiled model: PEFT's, or what lies ``below`` it.

    And whether it runs compiled in the end: behind ``torch._dynamo.config.recompile_limit``, 8, it does not.
    """
    of, make = shapes.config("tiny"), METHODS[method]
    assert make is not None
    model: Any = shapes.with_method(shapes.base_model(of, torch.float32, "cpu"), method)
    ids = shapes.text(of, 1, 16, "cpu")
    names = ["default", *[f"adapter{number}" for number in range(2, adapters + 1)]]
    for name in names[1:]:
        model.add_adapter(name, make())
    shapes.as_if_trained(model.eval())
    made, runs = [], []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        made.append(graph)
        return lambda *args: [runs.append(None), graph(*args)][1]

    torch.compiler.reset()
    compiled = torch.compile(model.get_base_model() if below else model, backend=backend)

    def switched(*to: str) -> int:
        """Graphs, in calls after each switch."""
        return sum(call(lambda name=name: model.set_adapter(name)) for name in to)  # type: ignore[misc]

    def call(step: Callable[[], Any]) -> int:
        before = len(made)
        step()
        with torch.no_grad():
            compiled(input_ids=ids, use_cache=False)
        return len(made) - before

    row = {"first call": switched("default"), "second adapter": switched(names[1])}
    row["back and forth"] = switched("default", names[1])
    if method == MEMORY:
        row["three scales"] = sum(call(lambda s=s: set_scale(model, s)) for s in (0.5, 0.25, 0.125))  # type: ignore[misc]
    row["further adapters"] = switched(*names[2:])
    before = len(runs)
    switched(names[-1])
    torch.compiler.reset()
    return row | {f"number {adapters} runs compiled": int(len(runs) > before)}


def measure(chosen: Namespace) -> dict[str, Any]:
    """All three."""
    found: dict[str, Any] = {"rows": in_rows(chosen), "loading": {}}
    for method, numbers in LOADED.items():
        found["loading"] |= into_model(method, numbers[: 1 if chosen.quick else None], "tiny" if chosen.quick else "8b")
    found["loading"] |= into_slots((1, 2) if chosen.quick else (1, 8, 64), "tiny" if chosen.quick else "8b")
    methods, number = ((MEMORY,), 2) if chosen.quick else ((MEMORY, LORA_QV), 12)
    whats = {f"{method}, {what}": (method, what == "below it") for method in methods for what in ("PEFT", "below it")}
    return found | {"compilations": {name: graphs(method, number, below) for name, (method, below) in whats.items()}}


def tables(record: Mapping[str, Any]) -> str:
    """What a record says, in Markdown."""
    return "\n".join(
        (
            measuring.table("ratio to one adapter for all rows", record["rows"]),
            measuring.table("8B shape, CPU", record["loading"]),
            measuring.table("graphs made by torch.compile", record["compilations"]),
        )
    )


def options(arguments: Sequence[str] | None = None) -> Namespace:
    parser = measuring.options(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[8], help="rows, each with an adapter")
    parser.add_argument("--tokens", type=int, default=64, help="of each row in a prefill")
    parser.add_argument("--front", type=int, default=32, help="tokens in the cache when one is decoded")
    chosen = measuring.start(parser, arguments)
    if chosen.quick:
        chosen.tokens, chosen.front, chosen.rows = 16, 8, [2]
    return chosen


if __name__ == "__main__":
    measuring.run(sys.modules[__name__])
