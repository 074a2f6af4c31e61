"""The benchmarks run, refuse to time what is wrong, and count bytes rightly. What they measure decides no test."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks is no installed package

from benchmarks import __main__ as command
from benchmarks import measuring, shapes, silent_front

from prefixmemory.tuner.layers import memory_layers

ROOT = Path(__file__).parent.parent
MEMORIES = ["default memory", "memory in full", "the paper's form", "memory, activated"]
ERRORS: dict[str, Callable[[Tensor], Tensor]] = {
    "output": lambda answer: 1.01 * answer,
    "gradient": lambda answer: answer + 0.01 * (answer - answer.detach()),
}


def checked(method: str, error: str | None = None) -> None:
    """Check a tiny model with ``method`` as the benchmarks do, with a planted error in its last layer."""
    of = shapes.config("tiny")
    model: Any = shapes.with_method(shapes.base_model(of, torch.float32, "cpu"), method)
    ids = shapes.text(of, 1, 24, "cpu")
    spoken = shapes.spoken_from(24) if method == "memory, activated" else 0
    if error is not None:
        last = memory_layers(model)[-1].memory("default")
        last.register_forward_hook(lambda module, args, answer: ERRORS[error](answer))
    shapes.check(model, lambda: model(input_ids=ids, use_cache=False), spoken=spoken, learns=True)


@pytest.mark.parametrize("method", MEMORIES)
def test_what_is_right_is_timed(method: str) -> None:
    checked(method)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("method", MEMORIES)
def test_what_is_wrong_is_not_timed(method: str, error: str) -> None:
    with pytest.raises(SystemExit, match=r"layer 1 is wrong by .*: nothing is timed"):
        checked(method, error)


def test_a_memory_that_speaks_too_early_is_not_timed() -> None:
    of = shapes.config("tiny")
    model = shapes.with_method(shapes.base_model(of, torch.float32, "cpu"), "default memory")
    ids = shapes.text(of, 1, 24, "cpu")
    with pytest.raises(SystemExit, match="nothing is timed"):
        shapes.check(model, lambda: model(input_ids=ids), spoken=shapes.spoken_from(24))


def test_kept_bytes_are_those_that_the_backward_pass_needs() -> None:
    layer = torch.nn.Linear(4, 3, bias=False)
    x = torch.ones(2, 4)
    assert measuring.kept_bytes(layer, lambda: layer(x).exp().sum()) == (x.numel() + 6) * 4  # x, exp(xW); not W


def test_peak_bytes_are_the_most_at_once() -> None:
    def step() -> Tensor:
        total = torch.zeros(())
        for _ in range(3):
            total = total + (torch.ones(1000) * 2).view(10, 100).sum()
        return total

    most = measuring.peak_bytes(step, "cpu")
    assert 2 * 4000 <= most < 2 * 4000 + 100  # ones and its double, never two rounds at once


def test_each_model_has_the_weights_of_one_base() -> None:
    base = shapes.base_model(shapes.config("tiny"), torch.float32, "cpu")
    own = {p.data_ptr() for p in base.parameters()}
    for method in shapes.METHODS:
        model = shapes.with_method(base, method)
        assert {p.data_ptr() for p in model.parameters()} >= own


@pytest.mark.parametrize("method", ["default memory", "memory in full", "LoRA q, v r=8", "LoRA all linear r=16"])
def test_a_floor_is_what_pytorch_counts(method: str) -> None:
    of, tokens = shapes.config("tiny"), 64
    base = shapes.base_model(of, torch.float32, "cpu")
    ids = shapes.text(of, 1, tokens, "cpu")
    model = shapes.with_method(base, method)

    def operations(model: Any) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        return counter.get_total_flops()

    bare = operations(shapes.with_method(base, "bare"))
    attention = 4 * of.num_hidden_layers * of.num_attention_heads * of.head_dim * tokens**2 / 2  # not counted on CPUs
    least = bare + attention - 2 * of.hidden_size * of.vocab_size
    floor = shapes.floors(model, method, of, tokens, 64, 8)["prefill"]
    assert (operations(model) - bare) / least == pytest.approx(floor - 1, rel=0.02)


def run(*arguments: str) -> str:
    """A benchmark in a process of its own: compilers and the tests' shape checks do not go together."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-W", "ignore", "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(record: Any) -> list[float]:
    if isinstance(record, dict):
        return [number for value in record.values() for number in numbers(value)]
    return [record] if isinstance(record, float) else []


def test_one_command_writes_the_record_and_the_figures(tmp_path: Path) -> None:
    run("benchmarks", "--quick", "--output", str(tmp_path / "bench.json"), "--images", str(tmp_path))
    record = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert {"overhead", "adapters", "length", "commit", "versions", "hardware", "options"} <= record.keys()
    assert record["options"]["overhead"]["seed"] == 0
    for part in ("overhead", "adapters", "length"):
        found = numbers(record[part])
        assert found and all(math.isfinite(number) and number >= 0 for number in found)
    for figure in ("benchmarks.png", "length.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")


def test_the_document_keeps_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = command.DOCUMENT.read_text(encoding="utf-8")
    assert written.count(command.MARK) == 1
    copy = tmp_path / "benchmarks.md"
    copy.write_text(written, encoding="utf-8")
    monkeypatch.setattr(command, "DOCUMENT", copy)
    row = {"decode, each": {"median": 1.2345, "low": 1.2, "high": 1.3}}
    record = {"commit": None, "hardware": "a machine", "versions": {"torch": "2"}}
    record |= {"adapters": {"rows": {"default memory, 8 rows": row}}}
    for tables in ("first", "second"):
        command.write_document(record, tables)
    text = copy.read_text(encoding="utf-8")
    assert text.startswith(written.partition(command.MARK)[0])
    assert "| 1.15 | 1.234 (1.200 to 1.300) |" in text and "second" in text and "first\n" not in text


def test_another_checkout_is_measured_in_turn() -> None:
    said = run("benchmarks.overhead", "--quick", "--methods", "default memory", "--against", str(ROOT / "src"))
    assert "this checkout" in said and "the other one" in said


def test_training_without_the_gradients_of_a_silent_front_is_checked_and_keeps_less(monkeypatch: Any) -> None:
    record = silent_front.measure(silent_front.options(["--quick"]))
    sizes = record["tokens"]["128"]["bytes"]
    assert sizes[silent_front.PARTS]["kept"] < 0.75 * sizes[silent_front.ONE]["kept"]
    assert silent_front.tables(record).count("\n") == 5
    read = silent_front.SilentFront.read

    def one_column_lost(self: Any, batch: Any) -> Any:
        rest = dict(read(self, batch))
        for layer in rest["past_key_values"].layers:
            layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]
        return {**rest, "attention_mask": rest["attention_mask"][:, 1:]}

    monkeypatch.setattr(silent_front.SilentFront, "read", one_column_lost)
    with pytest.raises(SystemExit, match=r"the gradient of .* differs by .*: nothing is timed"):
        silent_front.measure(silent_front.options(["--quick"]))
