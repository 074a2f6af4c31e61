"""The fused read on a GPU beside PyTorch's, eager and compiled, and beside the bytes that it cannot do without.

    python -m benchmarks.triton_read                       # prints a table, writes results/benchmarks/triton_read.json
    TRITON_INTERPRET=1 python -m benchmarks.triton_read --device cpu    # runs through, at sizes that mean nothing

One layer at the shapes of models of 3B and 8B, bfloat16, 4,096 tokens: rank 8 in float32 as it is trained, the same
in bfloat16, and M in full, shared by the query heads of a key/value head; forward, and forward with backward. And a
server's step: 64 tokens with 64 memories, whose kernel takes the place of the product over all slots. The floor is the
bytes of what is read and written, each once, over the rate at which this card copies. Before anything is timed, outputs
and gradients are compared with ``reference.py``; a wrong path is not timed. Ways are timed in turn; the table has the
median of the rounds, and the middle half of them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks.measuring import RESULTS, seconds
from torch import Tensor
from torch.nn import functional as F

from prefixmemory import reference, set_impl
from prefixmemory.files.records import provenance, write_json
from prefixmemory.kernels import triton_read
from prefixmemory.kernels.impl import Product
from prefixmemory.kernels.read import read
from prefixmemory.serving.bank import LayerBank, Step
from prefixmemory.serving.served import Manner, ServedLayer

RESULT = RESULTS / "triton_read.json"
LIMIT = 0.5
#: Query heads, key/value heads, size of a head.
SHAPES = {"3B": (24, 8, 128), "8B": (32, 8, 128)}
KINDS = {"rank 8, float32": (8, torch.float32), "rank 8": (8, torch.bfloat16), "full, shared": (None, torch.bfloat16)}


class Read:
    """One layer's read of ``tokens`` tokens."""

    def __init__(self, shape: tuple[int, int, int], kind: str, tokens: int, device: torch.device) -> None:
        heads, kv_heads, size = shape
        rank, dtype = KINDS[kind]

        def leaf(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(sizes, dtype=dtype, device=device).requires_grad_()

        self.query, self.outputs = leaf(1, tokens, heads, size), leaf(1, tokens, heads, size)
        groups = kv_heads if rank is None else heads
        sizes = [(size, size)] if rank is None else [(size, rank), (rank, size)]
        self.factors = tuple(leaf(groups, *each, dtype=dtype) for each in sizes)
        self.mean = torch.randn(groups, size, dtype=dtype, device=device)
        self.leaves = (self.query, self.outputs, *self.factors)
        self.given = torch.randn_like(self.outputs)
        compiled = torch.compile(self.by_torch) if device.type == "cuda" else None
        self.ways = {"Triton": self.by_triton, "torch": self.by_torch} | ({"compiled": compiled} if compiled else {})

    def by_torch(self) -> Tensor:
        query = self.query.to(self.factors[0].dtype)
        return read(query, self.outputs, self.factors, F.elu, self.mean, LIMIT)

    def by_triton(self) -> Tensor:
        product = Product(self.factors, F.elu, self.mean, ("elu", "none"))
        return triton_read.read(self.query, self.outputs, product, LIMIT)

    def by_reference(self) -> tuple[Tensor, ...]:
        """Output and gradients, in float32."""
        query, own, *factors = leaves = [x.detach().float().requires_grad_() for x in self.leaves]
        matrix = factors[0] if len(factors) == 1 else factors[0] @ factors[1]
        repeat = query.shape[2] // matrix.shape[0]
        phi = reference.feature_mean(F.elu, self.mean.float().repeat_interleave(repeat, dim=0))
        q, o = query.transpose(1, 2), own.transpose(1, 2)
        answer = reference.limited(reference.read_memory(q, matrix.repeat_interleave(repeat, 0), phi), o, LIMIT)
        new = (o + answer).transpose(1, 2)
        return new, *torch.autograd.grad(new, leaves, self.given.float())

    def check(self, way: str) -> None:
        """Refuse to time what does not answer, and learn, as ``reference.py`` does."""
        new = self.ways[way]()
        found = (new, *torch.autograd.grad(new, self.leaves, self.given))
        for number, (ours, right) in enumerate(zip(found, self.by_reference(), strict=True)):
            error = ((ours.float() - right).abs().max() / right.abs().max()).item()
            if not error < 3e-2:
                raise SystemExit(f"{way} is wrong by {error:.2g} in tensor {number}: nothing is timed")

    def forward(self, way: str) -> None:
        with torch.no_grad():
            self.ways[way]()

    def both(self, way: str) -> None:
        torch.autograd.grad(self.ways[way](), self.leaves, self.given)

    def floor(self, backward: bool) -> int:
        """Bytes: q, o and o'; then q, o, ∂o', ∂q and ∂o; and the memory, with its gradient."""
        memory = sum(x.nbytes for x in self.factors)
        return self.query.nbytes * (3 + 5 * backward) + memory * (1 + 2 * backward)


class Served:
    """A server's step in one layer: each token has a memory of its own."""

    def __init__(self, shape: tuple[int, int, int], tokens: int, device: torch.device) -> None:
        heads, _, size = shape
        half, width = torch.bfloat16, heads * size
        self.banks = {}
        layers = [
            ServedLayer(*(torch.randn(heads, *s).to(half) for s in ((size, 8), (8, size))), torch.randn(heads, size),
                        Manner("elu", "feature_mean", False, LIMIT, 1.0, 8)) for _ in range(tokens)
        ]  # fmt: skip
        for way, impl in (("Triton", "triton"), ("torch", "torch")):
            set_impl(impl)
            self.banks[way] = LayerBank(tokens, 8, heads, size, size, half, device)
            for slot, layer in enumerate(layers):
                self.banks[way].put(slot, layer)
        set_impl("auto")
        self.step = Step(tokens, width, half, device)
        self.step.point(torch.randperm(tokens))
        self.query, self.outputs = (torch.randn(tokens, width, device=device).to(half) for _ in range(2))
        self.ways = list(self.banks)

    def answer(self, way: str) -> Tensor:
        new = self.outputs.clone()
        self.banks[way].add_(new, self.query, self.query, self.step, captured=True)
        return new

    def check(self, way: str) -> None:
        error = (self.answer(way).float() - self.answer("torch").float()).abs().max() / self.outputs.abs().max()
        if not error < 3e-2:
            raise SystemExit(f"{way} is wrong by {error:.2g}: nothing is timed")

    def floor(self) -> int:
        """Bytes: q, o and o', and every token's factors."""
        bank = self.banks["Triton"]
        return 3 * self.query.nbytes + bank.A.nbytes + bank.B.nbytes


def bytes_a_second(device: torch.device) -> float:
    """At which a copy reads and writes."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**20, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), device, 10) for _ in range(5))


def measure(calls: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of every way in every round, in turn."""
    for call in calls.values():
        seconds(call, device)  # warm-up, and what is compiled
    taken: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(rounds):
        for way, call in calls.items():
            taken[way].append(seconds(call, device, 20 if device.type == "cuda" else 1))
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help=f"of the record; on a GPU {RESULT.name}")
    options = parser.parse_args()
    device, real = torch.device(options.device), options.device.startswith("cuda")
    torch.manual_seed(0)
    tokens, served = (4096, 64) if real else (5, 3)
    shapes = SHAPES if real else {"tiny": (4, 2, 16)}
    rounds = options.rounds if real else 2
    rate = bytes_a_second(device)
    cases: dict[str, tuple[int, dict[str, Callable[[], object]]]] = {}
    for size, shape in shapes.items():
        for kind in KINDS:
            one = Read(shape, kind, tokens, device)
            for way in one.ways:
                one.check(way)
            name = f"{size}, {kind}, {tokens} tokens"
            cases[f"{name}, forward"] = one.floor(False), {w: lambda o=one, w=w: o.forward(w) for w in one.ways}
            cases[f"{name}, with backward"] = one.floor(True), {w: lambda o=one, w=w: o.both(w) for w in one.ways}
        step = Served(shape, served, device)
        step.check("Triton")
        calls = {w: lambda s=step, w=w: s.answer(w) for w in step.ways}
        cases[f"{size}, {served} tokens of {served} memories, decoding"] = step.floor(), calls
    record: dict[str, dict[str, object]] = {}
    print(f"This {device.type} copies at {rate / 1e9:.0f} GB/s. Microseconds, and times the floor:\n")
    print("| case | floor | Triton | torch | compiled |\n|---|---|---|---|---|")
    for name, (floor, calls) in cases.items():
        taken = measure(calls, device, rounds)
        cells = [f"{floor / rate * 1e6:.0f}"]
        for way in ("Triton", "torch", "compiled"):
            low, middle, high = statistics.quantiles(taken[way], n=4) if way in taken else (0, 0, 0)
            within = f"{middle * 1e6:.0f} ({low * 1e6:.0f} to {high * 1e6:.0f}), {middle * rate / floor:.2f} ×"
            cells.append(within if way in taken else "")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        record[name] = {"floor_bytes": floor, "seconds": taken}
    output = options.output or (RESULT if real else None)
    if output is not None:
        write_json(output, {"cases": record, "bytes_a_second": rate, "device": str(device), **provenance()})


if __name__ == "__main__":
    main()
