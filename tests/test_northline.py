"""The data set that ships with the package, and the quickstart that uses it."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers.utils import logging

import tiny
from prefixmemory import PrefixMemoryError
from prefixmemory import quickstart as quickstart_module
from prefixmemory.rows.data import northline
from prefixmemory.training.settings import TrainingSettings

SPLITS = pytest.mark.parametrize("split", ["train", "test"])
LABELS = {
    "no connection", "slow connection", "bill question", "refund", "change plan", "cancel contract", "lost phone",
    "roaming", "book technician", "moving house", "keep number", "password reset", "payment method", "order status",
}  # fmt: skip


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower().replace("'", ""))


def trigrams(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return set(zip(found, found[1:], found[2:], strict=False))


def jaccard(a: set[Any], b: set[Any]) -> float:
    return len(a & b) / len(a | b) if a | b else 0.0


def closest(train: list[str], test: list[str], split: Any) -> float:
    """Largest similarity of any training text with any test text."""
    ours, theirs = [set(split(text)) for text in train], [set(split(text)) for text in test]
    return max(jaccard(a, b) for a in ours for b in theirs)


def texts(split: str) -> list[str]:
    return [row["text"] for row in northline(split)]


@SPLITS
def test_every_class_has_25_sentences(split):
    rows = northline(split)
    assert Counter(row["label"] for row in rows) == dict.fromkeys(LABELS, 25)
    assert all(row.keys() == {"text", "label"} for row in rows)


def test_no_sentence_occurs_twice():
    everything = [" ".join(words(text)) for text in [*texts("train"), *texts("test")]]
    assert [text for text, count in Counter(everything).items() if count > 1] == []


def test_no_test_sentence_is_close_to_a_training_sentence():
    train, test = texts("train"), texts("test")
    assert closest(train, test, words) < 0.6
    assert closest(train, test, trigrams) < 0.3
    # The check finds what it looks for: one test sentence, slightly reworded, among the training sentences.
    planted = re.sub(r"^\w+", "Well,", test[100])
    assert closest([*train, planted], test, words) > 0.6
    assert closest([*train, planted], test, trigrams) > 0.3


@SPLITS
def test_sentences_vary_in_length(split):
    lengths = [len(text.split()) for text in texts(split)]
    assert min(lengths) >= 4 and max(lengths) <= 48
    assert 12 <= sum(lengths) / len(lengths) <= 20
    assert min(lengths) <= 6 and max(lengths) >= 35


def test_length_does_not_give_the_class_away():
    for split in ("train", "test"):
        by_label: dict[str, list[int]] = {}
        for row in northline(split):
            by_label.setdefault(row["label"], []).append(len(row["text"].split()))
        for label, lengths in by_label.items():
            assert min(lengths) <= 9 and max(lengths) >= 18, label
            assert 10 <= sum(lengths) / len(lengths) <= 24, label


@SPLITS
def test_any_slice_of_the_files_is_balanced(split):
    labels = [row["label"] for row in northline(split)]
    for start in range(0, 350, 14):
        assert set(labels[start : start + 14]) == LABELS


@SPLITS
def test_the_files_are_found_as_package_resources(split):
    resource = files("prefixmemory") / "data" / "northline" / f"{split}.jsonl"
    lines = resource.read_text(encoding="ascii").splitlines()
    assert [json.loads(line) for line in lines] == northline(split)


def test_a_split_that_does_not_exist_is_refused():
    with pytest.raises(PrefixMemoryError, match=r"validation\.jsonl does not exist"):
        northline("validation")


# The quickstart, with a tiny model and few rows


@pytest.fixture
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    base = tiny.save_tiny(tmp_path / "base")
    tiny.reads(base, 4096)  # examples of 14 labels stand in front of a row
    monkeypatch.setattr(quickstart_module, "smollm2", lambda: str(base))
    monkeypatch.setattr(quickstart_module, "northline", lambda split: northline(split)[:14])
    monkeypatch.setattr(quickstart_module, "fast_dtype", lambda: "float32")
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)


def run_quickstart(folder: Path, **flags: bool) -> tuple[dict[str, Any], str]:
    screen = io.StringIO()
    settings = TrainingSettings(epochs=1.0, batch_size=7, seed=3)
    figures = quickstart_module.quickstart(
        folder, settings, flags.get("overwrite", False), False, Console(file=screen, width=160), again=False
    )
    return figures, screen.getvalue()


@pytest.mark.usefixtures("_small")
def test_the_quickstart_shows_and_records_its_figures(tmp_path, monkeypatch):
    # Answers that make every figure another one: 7, 1 and 14 of 14 are right.
    right = [row["label"] for row in northline("test")[:14]]
    given = iter([right[:7] + [""] * 7, right[:1] + ["roaming "] * 13, right])
    asked = []

    def answers(model, tokenizer, prompts, max_new_tokens, context="", progress=None):
        asked.append((prompts, context))
        progress(len(prompts))
        return next(given)

    monkeypatch.setattr(quickstart_module, "answers", answers)
    figures, screen = run_quickstart(tmp_path / "memory")

    recorded = json.loads((tmp_path / "memory" / "run.json").read_text())
    assert recorded["quickstart"] == figures
    assert figures["accuracy_base"] == 50.0
    assert figures["accuracy_base_one_example_a_label"] == pytest.approx(100 / 14)
    assert figures["accuracy_adapted"] == 100.0
    assert figures["seed"] == recorded["settings"]["seed"] == 3
    assert figures["learning_rate"] == recorded["settings"]["learning_rate"]
    in_heads, in_blocks = 2 * 4 * (8 * 8 + 8 * 8), 2 * 3 * 8 * (32 + 48)
    parameters = in_heads + in_blocks
    assert figures["trainable_parameters"] == recorded["trainable_parameters"] == parameters
    assert figures["adapter_bytes"] == (tmp_path / "memory" / "adapter_model.safetensors").stat().st_size
    assert figures["adapter_bytes"] >= 4 * figures["trainable_parameters"]
    assert 0 < figures["train_seconds"] <= figures["total_seconds"] < 60
    assert figures["peak_memory_mib"] > 100
    assert recorded["rows"] == 14 and recorded["base_model"].endswith("base")
    assert {path.name for path in (tmp_path / "memory").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "run.json",
    }  # fmt: skip

    # The base model is asked twice, with the labels listed and with one example a label, the memory without help.
    listed, shots, plain = asked
    assert all(prompt.startswith("Choose one of these labels: bill question, ") for prompt in listed[0])
    assert shots[1].count("\nLabel:") == 14 and shots[1].count("Text: ") == 14
    for row in northline("train")[:14]:
        assert f"Text: {row['text']}\nLabel: {row['label']}\n\n" in shots[1]
    assert shots[0] == plain[0] == [f"Text: {row['text']}\nLabel:" for row in northline("test")[:14]]
    assert listed[1] == plain[1] == ""

    rows = dict(re.findall(r"│ ([^│]+?) +│ ([^│]+?) +│\n", screen))
    assert rows["accuracy, base model with the labels listed"] == "50.0 %"
    assert rows["accuracy, base model with one example a label"] == "7.1 %"
    assert rows["accuracy with memory, reloaded in a new process"] == "100.0 %"
    assert rows["trainable parameters"] == f"{parameters:,}"
    assert rows["peak memory"] == f"{figures['peak_memory_mib']:,} MiB"
    assert northline("test")[0]["text"][:30] in screen
    assert f"prefixmemory generate --adapter {tmp_path / 'memory'} --prompt" in screen.replace("\n", "")


@pytest.mark.usefixtures("_small")
def test_the_quickstart_answers_with_the_model_itself(tmp_path):
    figures, screen = run_quickstart(tmp_path / "memory")
    assert all(0 <= figures[name] <= 100 for name in figures if name.startswith("accuracy"))
    assert "14 intents" in screen and "14 training and 14 test sentences" in screen
    with pytest.raises(PrefixMemoryError, match="already holds a finished run"):
        run_quickstart(tmp_path / "memory")
    before = (tmp_path / "memory" / "run.json").stat().st_mtime_ns
    run_quickstart(tmp_path / "memory", overwrite=True)
    assert (tmp_path / "memory" / "run.json").stat().st_mtime_ns > before
