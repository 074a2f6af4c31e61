"""The instrument for long inputs: accuracy as unrelated text is put in front of the question."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import PreTrainedModel

import tiny
from command_line import call, jsonl
from prefixmemory import PrefixMemoryError
from prefixmemory.analysis import LongInput, figures, long_input
from prefixmemory.rows.rendering import classification_prompt
from prefixmemory.rows.unrelated_text import unrelated_text
from prefixmemory.scoring.generation import accuracy, answers

#: Its name in the package is also that of the function.
INSTRUMENT = import_module("prefixmemory.analysis.long_input")
TOKENIZER = tiny.tokenizer()
ROWS = [{"text": f"line {i} is dead", "label": "abcd"[i % 4]} for i in range(8)]


def talker() -> PreTrainedModel:
    """A base model that says different things to different prompts, and soon comes to an end."""
    model = tiny.talker()
    model.generation_config.eos_token_id = [2, *range(6, len(TOKENIZER), 2)]
    return model


def answers_of(model: PeftModel, tokens: int, rows: list[dict[str, str]] = ROWS) -> list[str]:
    """What the model writes, one row at a time, with the text in the prompt."""
    text = unrelated_text(TOKENIZER, tokens)
    return [answers(model, TOKENIZER, [text + classification_prompt(row["text"])], 16)[0] for row in rows]


OTHERS = {
    "lora": LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


# What it measures


@pytest.mark.parametrize("method", ["memory", "inside", "lora", "prefix", "prompt"])
def test_it_counts_the_answers_of_whole_prompts(method: str) -> None:
    """Rows are labelled with what the model really says behind 40 tokens: all are right there, and few elsewhere."""
    if method == "memory":
        model = tiny.with_memory(talker())
    elif method == "inside":
        model = tiny.with_memory(talker(), placement="inside", prefix_length=3)
    else:
        model = get_peft_model(talker(), OTHERS[method]).eval()
    said = {tokens: answers_of(model, tokens) for tokens in (0, 40, 90)}
    with model.disable_adapter():
        base = answers_of(model, 40)
    labels = [label or "-" for label in said[40]]  # rows need a label; an empty answer is right nowhere
    found = long_input(
        model, TOKENIZER, [{**row, "label": label} for row, label in zip(ROWS, labels, strict=True)], [90, 0, 40]
    )
    assert (found.lengths, found.rows) == ([0, 40, 90], len(ROWS))
    assert found.accuracy == [accuracy(said[n], labels) for n in (0, 40, 90)]
    assert found.base_accuracy[1] == accuracy(base, labels)
    assert found.accuracy[1] >= 75 > min(*found.accuracy, *found.base_accuracy)  # neither all right nor all wrong


@pytest.mark.parametrize("keeps", [True, False])
def test_an_adapter_that_loses_accuracy_is_told_from_one_that_does_not(
    monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    model = tiny.with_memory(talker())
    right = {classification_prompt(row["text"]): row["label"] for row in ROWS}

    def says(model: PeftModel, tokenizer: object, prompts: list[str], *_: object, **options: Any) -> list[str]:
        on, context = model.get_model_status().enabled, options["context"]
        lost = 0 if keeps else len(context) // 50
        return [right[prompt] if on and i >= lost else "?" for i, prompt in enumerate(prompts)]

    monkeypatch.setattr(INSTRUMENT, "answers", says)
    found = long_input(model, TOKENIZER, ROWS, [0, 100, 200])
    assert found.accuracy == ([100.0] * 3 if keeps else [100.0, 75.0, 50.0])
    assert found.base_accuracy == [0.0] * 3


def test_batches_of_long_inputs_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {}

    def says(model: object, tokenizer: object, prompts: list[str], most: int, batch: int, **options: Any) -> list[str]:
        sizes[len(options["context"])] = batch
        assert most == 30  # the label, a blank before it and the end
        return prompts

    monkeypatch.setattr(INSTRUMENT, "answers", says)
    monkeypatch.setattr(INSTRUMENT, "BATCH_TOKENS", 1000)
    long_input(tiny.with_memory(talker()), TOKENIZER, [{"text": "hi", "label": "x" * 28}], [0, 100, 400])
    assert list(sizes) == [0, 102, 402]
    assert [1000 // (size + 46) for size in (102, 402)] == pytest.approx([sizes[102], sizes[402]], abs=1)
    assert sizes[0] > sizes[102] > sizes[402] >= 1


def test_without_a_wish_the_lengths_are_those_that_model_and_text_allow(tmp_path: Path) -> None:
    model = tiny.with_memory(talker())
    limit = model.config.max_position_embeddings
    found = long_input(model, TOKENIZER, ROWS[:2])
    assert found.lengths[:2] == [0, 256] and 400 < found.lengths[2] < limit and len(found.lengths) == 3
    longest = found.lengths[2]
    assert long_input(model, TOKENIZER, ROWS[:2], [longest]).accuracy == found.accuracy[2:]
    with pytest.raises(PrefixMemoryError, match=f"more than the {limit} that the model reads. Ask for {longest} at"):
        long_input(model, TOKENIZER, ROWS[:2], [longest + 1])
    file = tmp_path / "mine.txt"
    file.write_text("So short." * 10)
    assert long_input(model, TOKENIZER, ROWS[:2], None, file).lengths == [0, 90]


# What it refuses


@pytest.mark.parametrize(
    ("rows", "lengths", "message"),
    [
        ([{"prompt": "a", "completion": "b"}], [0], r"Row 1: has \['completion', 'prompt'\].*'text' and 'label'"),
        ([*ROWS, {"text": "no label"}], [0], r"Row 9: has \['text'\]"),
        ([], [0], "There are no rows"),
        (ROWS, [], "There is no length"),
        (ROWS, [0, -3], "tokens=-3 is out of range"),
        (ROWS, [4000], "4,000 tokens in front, .* are more than the 512 that the model reads"),
        ([{"text": "x" * 600, "label": "a"}], [0], "The longest prompt and its answer have 6.. tokens"),
    ],
)
def test_what_cannot_be_measured_is_one_line(rows: Any, lengths: list[int], message: str) -> None:
    with pytest.raises(PrefixMemoryError, match=message) as error:
        long_input(tiny.with_memory(tiny.build()), TOKENIZER, rows, lengths)
    assert "\n" not in str(error.value)


def test_it_needs_an_adapter() -> None:
    with pytest.raises(PrefixMemoryError, match="has no adapter"):
        long_input(tiny.build(), TOKENIZER, ROWS, [0])


# The figure


def test_the_interval_is_wilsons() -> None:
    """Against statsmodels' proportion_confint(method="wilson"), to the digits that it printed."""
    assert figures.interval(50.0, 10) == pytest.approx((23.66, 76.34), abs=0.01)
    assert figures.interval(0.0, 10) == pytest.approx((0, 27.75), abs=0.01)
    assert figures.interval(100.0, 350) == pytest.approx((98.91, 100), abs=0.01)


def test_the_figure_shows_adapters_and_one_base_model() -> None:
    pytest.importorskip("matplotlib")
    data = LongInput("", 20, [0, 256, 1024], [90.0, 80.0, 70.0], [5.0, 0.0, 0.0])
    other = LongInput("", 20, [0, 256, 1024], [90.0, 40.0, 10.0], [5.0, 0.0, 0.0])
    (axis,) = figures.long_input_figure({"memory": data, "lora": other}).axes
    assert axis.get_xlabel() == "unrelated text in front (tokens)"
    assert axis.get_ylabel() == "accuracy (% of rows)"
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert list(lines) == ["memory", "lora", "base model"]
    assert list(lines["lora"].get_xdata()) == [0, 256, 1024]
    assert list(lines["lora"].get_ydata()) == [90.0, 40.0, 10.0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "256", "1,024"]
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines.values()]
    assert all(len(set(part)) == 3 for part in zip(*looks, strict=True))


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and a memory, and rows labelled with what the memory says to them."""
    folder = tmp_path_factory.mktemp("long")
    model = tiny.with_memory(talker())
    talker().save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    model.active_peft_config.base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "memory")
    said = answers_of(model, 0)
    jsonl(folder / "rows.jsonl", ({**row, "label": label or "-"} for row, label in zip(ROWS, said, strict=True)))
    return folder


def test_one_command_from_rows_to_json_figure_and_page(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    words = ("--what", "long-input", "--data", folder / "rows.jsonl", "--limit", 6, "--context-lengths", "60,0")
    printed = call("inspect", folder / "memory", "--output", out, *words).success
    assert [Path(line).name for line in printed.split()] == ["long-input.json", "long-input.png", "index.html"]
    content = json.loads((out / "long-input.json").read_text())
    found = content["adapters"]["memory"]
    assert (found["lengths"], found["rows"]) == ([0, 60], 6)
    assert found["accuracy"][0] == 100 > max(found["accuracy"][1], *found["base_accuracy"])
    assert content["conditions"]["rows of long-input"] == "rows.jsonl, 6 at most"
    assert content["conditions"]["text in front"] == "essay on lighthouses, of the package"
    assert (out / "long-input.png").read_bytes().startswith(b"\x89PNG")


def test_the_text_in_front_can_be_ones_own(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "mine.txt"
    file.write_text("Something of my own. " * 3)
    words = ("--what", "long-input", "--data", folder / "rows.jsonl", "--limit", 2, "--context", file)
    assert call("inspect", folder / "memory", "--output", tmp_path / "out", *words).code == 0
    content = json.loads((tmp_path / "out" / "long-input.json").read_text())
    assert content["adapters"]["memory"]["lengths"] == [0, 63]
    assert content["conditions"]["text in front"] == "mine.txt"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--context-lengths", "0,many"), "context-lengths='0,many' is no list of numbers"),
        (("--context-lengths", "-1"), "context-lengths has -1"),
        (("--context-lengths", "9999", "--data", "rows.jsonl"), "are more than the 512 that the model reads"),
        (("--context", "no.txt"), "The text in front, no.txt, cannot be read"),
        (("--data", "pairs.jsonl"), "needs rows with 'text' and 'label'"),
        (("--limit", "2"), "right on none of 2 Northline messages"),
    ],
)
def test_the_command_refuses_in_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(folder)
    jsonl(folder / "pairs.jsonl", [{"prompt": "a", "completion": "b"}])
    answer = call("inspect", "memory", "--what", "long-input", "--output", tmp_path / "out", *words)
    assert answer.code == 1
    assert message in answer.err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
