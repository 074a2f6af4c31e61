"""Every YAML block and every command of docs/guides/recipes.md run as they stand, with a tiny model for SmolLM2."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

import tiny
from command_line import call, call_line, code_blocks, jsonl, weights
from prefixmemory.rows.data import Data
from prefixmemory.training.recipe import load_recipe
from prefixmemory.training.settings import TrainingSettings

GUIDE = Path(__file__).parent.parent / "docs" / "guides" / "recipes.md"
TEXT = GUIDE.read_text(encoding="utf-8")
BLOCKS = code_blocks(TEXT)
#: What is written between single backticks.
SPANS = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", TEXT, flags=re.DOTALL | re.MULTILINE))
ROWS = [{"question": f"line {i} is dead" + "!" * (i % 5), "topic": "abc"[i % 3]} for i in range(60)]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The guide's recipe, beside its data and a tiny model that goes by the name of ``smollm2``."""
    monkeypatch.chdir(tmp_path)
    base = tiny.save_tiny(tmp_path / "base")
    monkeypatch.setattr("prefixmemory.models.loading.smollm2", lambda: str(base))
    jsonl(tmp_path / "tickets.jsonl", ROWS)
    jsonl(tmp_path / "tickets-test.jsonl", ROWS[:6])
    file = Path("tickets.yaml")
    file.write_text(block("yaml", "model: "), encoding="utf-8")
    return file


def block(language: str, start: str) -> str:
    (found,) = [body for kind, body in BLOCKS if kind == language and body.startswith(start)]
    return found


def test_no_block_is_left_out():
    kinds = [(language, body.split()[0]) for language, body in BLOCKS]
    assert kinds == [
        ("yaml", "model:"),
        ("", "error:"),
        ("", "prefixmemory"),
        ("", "prefixmemory"),
    ]  # each has a test below


# The recipe


def test_the_recipe_trains_and_leaves_what_the_guide_says(recipe):
    assert "48 rows to train on" in call("recipes", "validate", recipe).success  # 16 of each label
    call("train", recipe).success  # noqa: B018
    listed = TEXT.partition("## What a run leaves\n")[2].partition("While it runs")[0]
    assert {file.name for file in Path("tickets-memory").iterdir()} == set(re.findall(r"`(\w+\.\w+)`", listed))


#: Field and value that a comment of the recipe offers.
OFFERED = [
    (name, value.strip())
    for name, comment in re.findall(r"^(dtype|quantization|report_to): .*# (.*)$", block("yaml", "model: "), re.M)
    for value in comment.split(",")
]


@pytest.mark.parametrize(("field", "value"), OFFERED)
def test_what_a_comment_of_the_recipe_offers_is_valid(recipe, field, value):
    written = f"[{value}]" if field == "report_to" else value
    recipe.write_text(re.sub(rf"^{field}: \S+", f"{field}: {written}", recipe.read_text(), flags=re.M))
    assert value in getattr(load_recipe(recipe), field)
    assert "is valid" in call("recipes", "validate", recipe).success


def test_the_error_is_what_the_commands_print(recipe):
    recipe.write_text(recipe.read_text().replace("learning_rate", "lerning_rate"))
    for words in (("recipes", "validate"), ("train",)):
        answer = call(*words, recipe)
        assert (answer.code, answer.err) == (1, block("", "error: "))


def test_the_columns_in_the_text_put_columns_together(recipe):
    (columns,) = [span for span in SPANS if span.startswith("columns: {")]
    jsonl(Path("reading.jsonl"), [{"context": "It rains.", "question": "Wet?", "answer": "Yes."}])
    recipe.write_text(f"model: smollm2\noutput: reading\ndata:\n  train: reading.jsonl\n  {columns}\n")
    assert load_recipe(recipe).data.training_rows(0) == [{"prompt": "It rains.\n\nWet?", "completion": "Yes."}]
    assert "1 to train on" in call("train", recipe, "--dry-run").success


# Commands


def test_the_commands_in_the_text_run_and_load_no_weight(recipe):
    Path("base", "model.safetensors").unlink()
    jsonl(Path("train.jsonl"), [{"text": row["question"], "label": row["topic"]} for row in ROWS])
    found = [span for span in SPANS if re.match(r"(prefixmemory|recipes|train) ", span)]
    said = {}
    for command in found:
        line = command.replace("NAME", "classification").replace("FILE", "mine.yaml")
        said[command] = call_line(f"prefixmemory {line.removeprefix('prefixmemory ')}").success
    phrases = {
        "prefixmemory recipes ls": "classification",
        "recipes cp NAME FILE": "Copied to mine.yaml.",
        "recipes validate FILE": "mine.yaml is valid: 60 rows to train on.",
        "train FILE --dry-run": "60 to train on",
    }
    assert said.keys() == phrases.keys()
    assert [command for command, phrase in phrases.items() if phrase not in said[command]] == []


def test_set_reaches_a_field_that_has_no_flag(recipe):
    (option,) = [span for span in SPANS if span.startswith("--set ")]
    call_line(f"prefixmemory train {recipe} {option}").success  # noqa: B018
    assert json.loads(Path("tickets-memory", "run.json").read_text())["settings"]["warmup"] == 0.05


@pytest.mark.parametrize("section", [Data, TrainingSettings])
def test_all_fields_are_in_the_tables_with_their_defaults(section):
    head = {Data: "| `data` |", TrainingSettings: "| `training` |"}[section]
    rows = TEXT.partition(head)[2].partition("\n\n")[0].splitlines()[2:]
    said = {}
    for row in rows:
        names, defaults = (cell.strip() for cell in row.strip("|").split(" | ")[:2])
        names, defaults = names.replace("`", "").split(", "), defaults.replace("`", "").split(", ")
        said |= dict(zip(names, defaults * (len(names) if len(defaults) == 1 else 1), strict=True))
    known = {field.name: field.default for field in dataclasses.fields(section)}
    assert said.keys() == known.keys()
    words = {"-": dataclasses.MISSING, "none": None, "no": False, "auto": None}
    for name, value in said.items():
        same = [words.get(value, value), value]  # "none" is a choice of one field
        assert known[name] in same or float(value) == known[name], name


def test_what_was_trained_is_scored_and_asked(recipe):
    call("train", recipe).success  # noqa: B018
    evaluate, generate = block("", "prefixmemory evaluate").splitlines()
    assert "rows 6" in call_line(evaluate).success
    assert json.loads(Path("tickets-memory", "run.json").read_text())["metrics"]
    assert call_line(generate).success


def test_lora_is_put_beside_it(recipe):
    train, evaluate = block("", "prefixmemory train").replace("\\\n", "").splitlines()
    call_line(train).success  # noqa: B018
    made = weights(Path("tickets-lora"))
    assert {min(tensor.shape) for tensor in made.values()} == {8} and all(".lora_" in name for name in made)
    assert {name.split(".")[-3] for name in made} == {  # all linear
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert json.loads(Path("tickets-lora", "run.json").read_text())["settings"]["learning_rate"] == 1e-3
    assert "rows 6" in call_line(evaluate).success
