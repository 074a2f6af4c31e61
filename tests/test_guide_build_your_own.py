"""The blocks of docs/guides/build-your-own.md run as they stand, a tiny model for SmolLM2; what they print holds."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers.utils import logging

import tiny
from close import close_logits, same_parameters, tensors
from command_line import code_blocks
from prefixmemory.adapters.loading import Adapter, load_adapter
from prefixmemory.analysis import readout, spectrum, tradeoff
from prefixmemory.analysis.inputs import token_ids
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.memories.registry import MEMORIES
from prefixmemory.tuner.layers import memory_layers
from processes import run_python

TEXT = (Path(__file__).parent.parent / "docs" / "guides" / "build-your-own.md").read_text(encoding="utf-8")
BLOCKS = code_blocks(TEXT)
#: Files of the guide, and how many of their lines are code.
FILES = ("gated.py", "train_gated.py", "look.py")
SMOLLM2, TINY = dict(layers=30, heads=9, kv_heads=3, dim=64), dict(layers=2, heads=4, kv_heads=2, dim=8)


def file_of(block: str) -> str | None:
    """The file that a block says it is: ``# name.py`` in its first line."""
    named = re.match(r"# (\w+\.py)", block)
    return named[1] if named else None


def code_lines(block: str) -> int:
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in block.splitlines())


def parameters(layers: int, heads: int, kv_heads: int, dim: int) -> list[int]:
    """What each block says about the number of parameters, in order."""
    prefix, memory, gate = layers * kv_heads * 20 * 2 * dim, heads * dim * dim, heads * dim + heads
    return [*[prefix] * 3, layers * memory, layers * (memory + gate), memory + layers * heads]


def counts(text: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"^([\d,]+) parameters", text, re.MULTILINE)]


def without_figures(text: str) -> str:
    return re.sub(r"\d[\d.,]*\d|\d", "N", re.sub(r"\[.*\]", "[...]", text))


@dataclass
class Run:
    """Where the guide was run, and what each block that is followed by its output printed."""

    place: Path
    printed: list[tuple[str, str]]

    def adapter(self) -> Adapter:
        return load_adapter(str(self.place / "gated-memory"), dtype="float32")


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    place = tmp_path_factory.mktemp("guide")
    base = tiny.save_tiny(place / "base")
    registered = dict(MEMORIES)
    names: dict[str, Any] = {}
    printed, shown_by_look = [], ""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.syspath_prepend(place)
        patch.setattr("prefixmemory.models.loading.smollm2", lambda: str(base))
        for number, (language, block) in enumerate(BLOCKS):
            if language != "python":
                continue
            name = file_of(block)
            if name is not None:
                with (place / name).open("a", encoding="utf-8") as file:
                    file.write(block)
            follows, shown = BLOCKS[number + 1]
            if name == "gated.py":
                continue
            if name == "look.py":
                shown_by_look += shown
                continue
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                exec(compile(block, f"build-your-own.md, block {number}", "exec"), names if name is None else {})
            if follows == "text":
                printed.append((shown, stream.getvalue()))
            else:
                assert stream.getvalue() == ""
        printed.append((shown_by_look, run_python("look.py", folder=place, PYTHONPATH=str(place))))
        yield Run(place, printed)
    sys.modules.pop("gated", None)
    MEMORIES.clear()
    MEMORIES.update(registered)


def test_the_method_is_under_forty_lines_with_training_saving_and_looking():
    by_file = {name: 0 for name in FILES}
    for language, block in BLOCKS:
        if language == "python" and (name := file_of(block)) and "continued" not in block.splitlines()[0]:
            by_file[name] += code_lines(block)
    assert min(by_file.values()) > 5 and sum(by_file.values()) < 40, by_file


def test_every_block_prints_what_the_guide_shows_but_for_the_figures(guide: Run):
    assert len(guide.printed) == 7
    for shown, printed in guide.printed:
        assert without_figures(printed) == without_figures(shown)
    assert "parameters" in without_figures(guide.printed[0][1])  # control: words are left


def test_the_numbers_of_parameters_are_those_of_the_equations(guide: Run):
    assert counts(TEXT) == parameters(**SMOLLM2)
    assert counts("".join(printed for _, printed in guide.printed)) == parameters(**TINY)


def test_only_the_free_memories_start_as_the_base_model(guide: Run):
    """In the guide's figures and in those of the tiny model."""
    for text in (TEXT, "".join(printed for _, printed in guide.printed)):
        inside, outside, kernel, free, shared = map(float, re.findall(r"logits move by ([\d.]+)$", text, re.MULTILINE))
        assert inside > 0 and outside > 0 and free == shared == 0
        assert outside == kernel  # values of zero: both leave λ·o


def test_the_model_card_says_what_must_be_imported(guide: Run):
    card = (guide.place / "gated-memory" / "README.md").read_text(encoding="utf-8")
    (loading,) = [block for language, block in code_blocks(card) if language == "python"]
    assert loading.startswith("# first import the module that registers memory='gated'\n")
    assert "The code that answers is not in this folder." in card


def test_training_moved_the_memory_of_every_head_and_not_the_base_model(guide: Run):
    weights = load_file(guide.place / "gated-memory" / "adapter_model.safetensors")
    start = {"M": 0.0, "w": 0.0, "b": 2.0}
    assert len(weights) == 3 * TINY["layers"]
    for name, tensor in weights.items():
        moved = (tensor - start[name.rpartition(".")[2]]).reshape(TINY["heads"], -1).abs().amax(dim=1)
        assert moved.min() > 0, name
    model, ids = guide.adapter().model, tiny.tokens()
    with torch.no_grad():
        adapted = model(input_ids=ids, use_cache=False).logits
        with model.disable_adapter():
            base = model(input_ids=ids, use_cache=False).logits
        close_logits(base, tiny.build()(input_ids=ids, use_cache=False).logits)
    own = {name: tensor for name, tensor in tensors(model).items() if "prefix_memory" not in name}
    same_parameters(own, tiny.build())
    assert (adapted - base).abs().max() > 1e-3


def test_what_the_new_process_printed_is_what_the_instruments_measure(guide: Run):
    adapter = guide.adapter()
    ids = token_ids(adapter.tokenizer, None, 256)
    added, rank, speaks, gates = guide.printed[-1][1].splitlines()
    values = torch.tensor(tradeoff(adapter.model, ids, [16, 256]).values)
    found = torch.tensor([float(number) for number in re.findall(r"\d+\.\d+", added.partition("(")[2])])
    torch.testing.assert_close(found, values.mean(dim=(1, 2)), atol=2e-4, rtol=1e-3)
    assert rank.endswith(str([round(value) for value in spectrum(adapter.model, ids).effective_rank]))
    by_size = max(readout(adapter.model, adapter.tokenizer).directions, key=lambda direction: direction.singular_value)
    assert speaks == f"{by_size.layer}, head {by_size.head}, speaks for {by_size.tokens}"

    opened = []
    for layer in memory_layers(adapter.model):
        module = layer.memory("default")

        def see(own: Any, args: tuple[torch.Tensor], output: torch.Tensor, module: Any = module) -> None:
            opened.append(torch.sigmoid((args[0] * module.w).sum(dim=-1) + module.b))

        module.register_forward_hook(see)
    with torch.no_grad():
        adapter.model(ids)
    every = torch.stack(opened)
    shown = [float(number) for number in re.findall(r"\d\.\d\d", gates)]
    assert shown == pytest.approx([float(x) for x in (every.min(), every.max(), every.mean())], abs=0.006)
    assert (every - torch.sigmoid(torch.tensor(2.0))).abs().max() > 1e-3  # control: they are not where they began


def test_without_the_import_loading_stops_with_the_line_of_the_guide(guide: Run, monkeypatch: pytest.MonkeyPatch):
    (line,) = [block for language, block in BLOCKS if language == "text" and "is not registered" in block]
    base = tiny.build()
    builtin = {name: MEMORIES[name] for name in ("matrix", "prefix")}
    monkeypatch.setattr("prefixmemory.memories.registry.MEMORIES", builtin)
    for load in (guide.adapter, lambda: PeftModel.from_pretrained(base, guide.place / "gated-memory")):
        with pytest.raises(PrefixMemoryError) as refusal:
            load()
        place, _, said = str(refusal.value).rpartition("adapter_config.json: ")
        assert said == line.strip() and place in ("", f"{guide.place / 'gated-memory'}/")


def test_the_command_line_inspects_it_when_it_is_given_the_import(guide: Run, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib")
    (command,) = [block for language, block in BLOCKS if language == "" and block.startswith("python -c")]
    _, _, code, *words = shlex.split(command)
    monkeypatch.chdir(guide.place)
    verbosity = logging.get_verbosity()  # the command line silences libraries for its process
    words += ["--what", "readout", "--tokens", "32", "--heads", "1"]  # the other instruments take their time
    for script, expected in ((code.replace("import gated; ", ""), 1), (code, 0)):
        with (
            mock.patch.object(sys, "argv", ["-c", *words]),
            mock.patch.dict(MEMORIES, clear=expected == 1),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()) as said,
            pytest.raises(SystemExit) as exit_,
        ):
            exec(script, {})
        logging.set_verbosity(verbosity)
        assert exit_.value.code == expected, said.getvalue()
        if expected == 1:
            assert said.getvalue().startswith(
                "error: gated-memory/adapter_config.json: memory='gated' is not registered. Import the module"
            )
    written = {file.name for file in (guide.place / "gated-inspected").iterdir()}
    assert {"readout.json", "readout.png", "index.html"} <= written
