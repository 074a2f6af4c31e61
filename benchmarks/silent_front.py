"""Training on rows with a long text in front of the invocation: one pass, or the text read without gradients.

    python -m benchmarks.silent_front --output results/benchmarks/silent_front.json

Random weights of a known shape, one thread, rows whose last tokens alone are spoken on. The memory that waits for its
invocation is trained as our Trainer does it (:class:`SilentFront`), and in one pass; LoRA cannot leave the text out,
since what it changes there is what the answer reads. The gradients of both ways must be the same, or nothing is timed.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmarks import measuring, shapes

from prefixmemory import calibrate
from prefixmemory.training.silent_front import SilentFront

ONE, PARTS, LORA = "memory, in one pass", "memory, silent front", "LoRA q, v r=8"
SPOKEN = 64


def options(arguments: Sequence[str] | None = None) -> Namespace:
    parser = measuring.options(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 2048])
    return measuring.start(parser, arguments)


def measure(chosen: Namespace) -> dict[str, Any]:
    """By number of tokens a row: seconds of a step, in rounds, and the bytes that it keeps and holds at most."""
    of = shapes.config(chosen.shape)
    base = shapes.base_model(of, getattr(torch, chosen.dtype), chosen.device)
    memory, lora = (shapes.with_method(base, name).train() for name in ("memory, activated", LORA))
    found: dict[str, Any] = {}
    for tokens in [128] if chosen.quick else chosen.tokens:
        ids = shapes.text(of, 1, tokens, chosen.device)
        ids[ids == shapes.INVOCATION[0]] = 3  # it stands elsewhere here
        ids[:, -SPOKEN : 2 - SPOKEN] = torch.tensor(shapes.INVOCATION, device=ids.device)
        labels = ids[:, -SPOKEN // 2 :]
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(tokens, device=ids.device)[None],
            "labels": labels,
            "logits_to_keep": labels.shape[1],
        }
        calibrate(memory, **batch)
        front, placed = SilentFront(memory), {**batch, "active": torch.tensor([tokens - SPOKEN], device=ids.device)}
        losses: dict[str, Callable[[], Any]] = {
            ONE: lambda batch=batch: memory(**batch, use_cache=False).loss,
            PARTS: lambda front=front, placed=placed: memory(**front.read(placed)).loss,
            LORA: lambda batch=batch: lora(**batch, use_cache=False).loss,
        }
        _check(memory, losses)
        steps = {name: _step(lora if name == LORA else memory, loss) for name, loss in losses.items()}
        rounds = [
            {name: measuring.seconds(step, chosen.device) for name, step in steps.items()} for _ in range(chosen.rounds)
        ]
        sizes = {
            name: {
                "kept": measuring.kept_bytes(lora if name == LORA else memory, loss),
                "peak": measuring.peak_bytes(steps[name], chosen.device),
            }
            for name, loss in losses.items()
        }
        found[str(tokens)] = {"seconds": rounds, "bytes": sizes}
    return {"spoken": SPOKEN, "tokens": found}


def _step(model: Any, loss: Callable[[], Any]) -> Callable[[], None]:
    def step() -> None:
        loss().backward()
        model.zero_grad(set_to_none=True)

    return step


def _check(model: Any, losses: dict[str, Callable[[], Any]]) -> None:
    """Both ways give the same gradients."""
    found = []
    for name in (ONE, PARTS):
        losses[name]().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    whole, parts = found
    tolerance = shapes.TOLERANCE[next(iter(whole.values())).dtype]
    for name, gradient in whole.items():
        error = ((parts[name] - gradient).abs().max() / gradient.abs().max()).item()
        if not error < 10 * tolerance:  # they have come through all layers
            raise SystemExit(f"the gradient of {name} differs by {error:.2g}: nothing is timed")


def tables(record: dict[str, Any]) -> str:
    """Ratios to LoRA, each within a round, and megabytes."""
    rows: dict[str, dict[str, Any]] = {}
    for tokens, found in record["tokens"].items():
        for name in (ONE, PARTS, LORA):
            ratio = [each[name] / each[LORA] for each in found["seconds"]]
            row = rows.setdefault(name, {})
            row[f"{tokens} tokens: time, to LoRA"] = measuring.middle(ratio)
            row[f"{tokens}: kept, MiB"] = found["bytes"][name]["kept"] / 2**20
            row[f"{tokens}: peak, MiB"] = found["bytes"][name]["peak"] / 2**20
    return measuring.table(f"training step, {record['spoken']} tokens spoken on", rows)


if __name__ == "__main__":
    measuring.run(sys.modules[__name__])
