"""Tasks: the shipped ones are sound, a user's own is one YAML file and one of rows, and what is wrong is named."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import pytest

import tiny
from command_line import jsonl
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.rows.rows import Row, check_objective, check_row, row_format
from prefixmemory.tasks import load_task, shipped_tasks
from prefixmemory.tasks.metrics import last_number
from prefixmemory.tasks.scoring import score
from prefixmemory.tasks.task import SCORED_ROWS, Task

#: The project's data, where it is at hand; the package itself does without.
SHARED = Path(__file__).parents[2] / "shared" / "data"
with_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
EVERY = pytest.mark.parametrize("name", shipped_tasks())


# The shipped ones


def test_every_kind_of_scoring_has_a_task():
    assert {load_task(name).scoring for name in shipped_tasks()} == set(SCORED_ROWS)
    assert {"gsm8k", "xquad_en", "e2e_nlg", "dolly_open_qa", "ultrafeedback", "hh_rlhf_helpful"} < set(shipped_tasks())


@EVERY
def test_a_shipped_task_says_what_it_is(name):
    task = load_task(name)
    assert task.name == name and task.description.endswith((".", name.removeprefix("bbh_") + "."))
    assert task.folder and task.licence
    assert [line.partition(":")[0] for line in task.changelog] == [str(i) for i in range(1, task.version + 1)]
    assert set(task.transfers_to) <= set(shipped_tasks()) - {name}
    assert (task.scoring == "exact_match") == (task.max_new_tokens is None) or task.scoring == "loss"
    task.check_installed()
    text = (files("prefixmemory") / "tasks" / f"{name}.yaml").read_text()
    assert task.hub is not None or "# No hub: " in text  # or why not


@cache
def rows_of(name: str, split: str) -> list[Row]:
    return load_task(name).rows(SHARED, split)  # type: ignore[arg-type]


@with_data
@EVERY
def test_its_rows_can_be_read(name):
    task = load_task(name)
    train, test = rows_of(name, "train"), rows_of(name, "test")
    assert len(train) >= 60 and len(test) >= 40
    for rows in (train, test):
        assert row_format(rows) in SCORED_ROWS[task.scoring]
        check_objective(task.settings().objective, rows)
    source = (SHARED / str(task.folder) / "SOURCE.md").read_text()
    assert f"**{task.licence}**" in source


@with_data
def test_every_answer_of_gsm8k_is_the_result_of_its_solution():
    for split in ("train", "test"):
        for row in rows_of("gsm8k", split):
            found = last_number(row["completion"])
            assert found is not None and found == last_number(str(row["answer"])), row.where


@with_data
def test_table_to_text_has_several_references_and_reading_a_paragraph():
    rows = rows_of("e2e_nlg", "test")
    assert len(rows) == 630 and max(len(row["references"]) for row in rows) == 45
    assert all(row["completion"] == row["references"][0] for row in rows)
    row = rows_of("xquad_en", "test")[0]
    assert row["prompt"].endswith("?") and row["completion"] in row["prompt"] and "context" not in row


@with_data
@pytest.mark.parametrize("name", ["bbh_navigate", "ultrafeedback"])
def test_a_run_gets_its_rows(name):
    split = load_task(name).split(SHARED, validation=30, test=40, seed=0)
    assert len(split.validation) == 30 and len(split.test) == 40 and split.train
    assert {row.where for row in split.train}.isdisjoint(row.where for row in split.validation)


#: What the Hub's data sets hold, in their own columns: a few rows each.
TOPICS = datasets.Features(
    {"title": datasets.Value("string"), "content": datasets.Value("string"),
     "label": datasets.ClassLabel(names=["Company", "Film"])}
)  # fmt: skip
HUB: dict[str, tuple[list[dict[str, Any]], datasets.Features | None, str, dict[str, Any]]] = {
    "mteb/banking77": ([{"text": "lost", "label": 3, "label_text": "lost_card"}], None, "text", {"label": "lost_card"}),
    "fancyzhx/dbpedia_14": (
        [{"title": "Heat", "content": " A film.", "label": 1}], TOPICS, "text",
        {"text": "Title: Heat\nText:  A film.", "label": "Film"},
    ),
    "SaylorTwift/bbh": (
        [{"input": "not True is", "target": "False"}], None, "text", {"text": "not True is", "label": "False"},
    ),
    "openai/gsm8k": (
        [{"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 2"}], None, "prompt",
        {"prompt": "1+1?", "completion": "It is <<1+1=2>>2.\n#### 2"},
    ),
    "databricks/databricks-dolly-15k": (
        [
            {"instruction": "Sum it up.", "context": "Long.", "response": "Short.", "category": "summarization"},
            {"instruction": "Why?", "context": "", "response": "So.", "category": "open_qa"},
        ],
        None, "instruction", {"instruction": "Why?", "input": "", "output": "So.", "category": "open_qa"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in shipped_tasks() if load_task(name).hub])
def test_rows_of_the_hub_are_mapped(name, monkeypatch):
    task = load_task(name)
    content, features, kind, expected = HUB[str(task.hub)]
    asked = []

    def load_dataset(name: str, subset: str | None = None, split: str | None = None) -> datasets.Dataset:
        asked.append((name, subset, split))
        return datasets.Dataset.from_list(content, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, test = task.rows(None, "train"), task.rows(None, "test")
    assert asked == [(task.hub, task.hub_subset, split) for split in task.hub_splits] and len(set(asked)) == 2
    assert len(train) == len(test) == 1 and row_format(train) == kind
    assert expected.items() <= train[0].items()
    if task.scoring == "number":
        assert "answer" not in train[0]  # the result is read off the solution, not off a field of another meaning


# A user's own

OWN = """\
name: fruit
version: 1
description: What kind of fruit it is.
licence: my own
train: rows/train.jsonl
test: rows/test.jsonl
per_label: 4
training: {epochs: 5}
changelog: ["1: first version."]
"""
KINDS = (("red", "apple"), ("round", "cherry"), ("long", "banana"))
FRUIT = [{"text": f"{look} {i}", "label": kind} for i in range(10) for look, kind in KINDS]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "rows").mkdir()
    jsonl(tmp_path / "rows" / "train.jsonl", FRUIT[:21])
    jsonl(tmp_path / "rows" / "test.jsonl", FRUIT[21:])
    file = tmp_path / "fruit.yaml"
    file.write_text(OWN)
    return file


def test_a_task_of_ones_own_is_a_yaml_file_and_rows(own, monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # its files lie beside it, wherever one is
    for task in (load_task(str(own)), load_task("../fruit.yaml"), load_task("fruit.yaml", beside=tmp_path)):
        assert (task.name, task.settings().epochs, task.scoring) == ("fruit", 5, "exact_match")
        split = task.split(None, validation=6, test=5, seed=0)
        assert (len(split.train), len(split.validation), len(split.test)) == (12, 6, 5)
        counts = {label: sum(row["label"] == label for row in split.train) for label in ("apple", "cherry", "banana")}
        assert set(counts.values()) == {4}
        found = score(tiny.build(), tiny.tokenizer(), task, split.test)
        assert len(found.points) == len(found.answers) == 5
    changed = load_task(str(own), {"per_label": 2, "name": "less"})
    assert changed.name == "less" and len(changed.split(None, 6, 5, 0).train) == 6


def test_a_seed_draws_the_training_rows_and_nothing_else(own):
    task = load_task(str(own), {"per_label": 2})
    first, second = task.split(None, 6, 5, 0), task.split(None, 6, 5, 1)
    assert first.train != second.train
    assert (first.validation, first.test) == (second.validation, second.test)
    for split in (first, second):
        assert not [row for row in split.train if row in split.validation]


def test_a_folder_of_that_name_below_the_data_comes_first(own, tmp_path):
    (tmp_path / "data" / "mine").mkdir(parents=True)
    for split in ("train", "test"):
        jsonl(tmp_path / "data" / "mine" / f"{split}.jsonl", [{"text": "big", "label": "melon"}] * 3)
    task = load_task(str(own), {"folder": "mine"})
    assert {row["label"] for row in task.rows(tmp_path / "data", "test")} == {"melon"}
    assert {row["label"] for row in task.rows(tmp_path / "nothing", "test")} == {"apple", "cherry", "banana"}


def test_rows_are_chosen_by_fields_labels_and_length(tmp_path):
    rows = [{"text": "a" * (i + 1), "label": "xyz"[i % 3], "part": "12"[i % 2]} for i in range(12)]
    for split in ("train", "test"):
        jsonl(tmp_path / f"{split}.jsonl", rows)
    file = tmp_path / "t.yaml"
    file.write_text(re.sub("rows/", "", OWN))
    kept = load_task(str(file), {"where": {"part": "2"}, "labels": 2, "longest_text": 8}).rows(None, "train")
    # a column that is neither read nor written is not counted
    expected = [row for row in rows if row["part"] == "2" and row["label"] in "xy" and len(row["text"]) + 1 <= 8]
    assert kept == expected and len(expected) == 2
    last = load_task(str(file), {"first_label": 1}).rows(None, "train")
    assert last == [row for row in rows if row["label"] in "yz"]
    middle = load_task(str(file), {"first_label": 1, "labels": 1}).rows(None, "train")
    assert middle == [row for row in rows if row["label"] == "y"]


def test_labels_are_those_of_the_training_split(own):
    """Of apple, banana and cherry; the test split has no apple."""
    jsonl(own.parent / "rows" / "test.jsonl", [row for row in FRUIT[21:] if row["label"] != "apple"])
    task = load_task(str(own), {"labels": 2})
    assert {row["label"] for row in task.rows(None, "train")} == {"apple", "banana"}
    assert {row["label"] for row in task.rows(None, "test")} == {"banana"}


def test_characters_of_every_message_are_counted():
    def kept(longest: int) -> int:
        task = Task("mine", 1, "", "CC0", "loss", folder="mine", longest_text=longest)
        turns = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}]
        return len(task._kept(None, [check_row("a", {"messages": turns})], {}, "train"))

    assert (kept(5), kept(4)) == (1, 0)


def test_half_of_a_folder_is_refused(own, tmp_path):
    """The other half would come from elsewhere."""
    (tmp_path / "data" / "mine").mkdir(parents=True)
    jsonl(tmp_path / "data" / "mine" / "train.jsonl", [{"text": "big", "label": "melon"}] * 3)
    task = load_task(str(own), {"folder": "mine"})
    for split in ("train", "test"):
        with pytest.raises(PrefixMemoryError, match=r"has train\.jsonl alone\. Give both files"):
            task.rows(tmp_path / "data", split)


def test_a_row_that_the_file_holds_twice_is_not_validated_on_where_it_was_trained_on(own):
    rows = [dict(row) for row in FRUIT[:6] for _ in range(2)]
    jsonl(own.parent / "rows" / "train.jsonl", rows)
    split = load_task(str(own), {"per_label": None, "limit": 7}).split(None, 5, 5, 0)
    assert len(split.train) == 7 and split.validation and not [row for row in split.validation if row in split.train]
    jsonl(own.parent / "rows" / "train.jsonl", [dict(FRUIT[0]) for _ in range(12)])
    with pytest.raises(PrefixMemoryError, match="validation rows are all among its training rows"):
        load_task(str(own), {"per_label": None, "limit": 7}).split(None, 5, 5, 0)


TYPOS = {
    "a field": ("per_label:", "per_lable:", 7, ["per_lable is no field of a task", "'per_label'?"]),
    "a scoring": ("per_label: 4", "scoring: exact_mtch", 7, ["scoring='exact_mtch'", "'exact_match'?"]),
    "a type": ("per_label: 4", "per_label: four", 7, ["per_label='four'"]),
    "a range": ("per_label: 4", "per_label: 0", 7, ["per_label=0", "above 0"]),
    "no first label": ("per_label: 4", "first_label: -1", 7, ["first_label=-1"]),
    "a setting": ("{epochs: 5}", "{epoch: 5}", 8, ["epoch is no field of training", "'epochs'?"]),
    "a setting's value": ("{epochs: 5}", "{epochs: -1}", 8, ["training.epochs=-1"]),
    "what the protocol sets": ("{epochs: 5}", "{seed: 5}", 8, ["training.seed is what the protocol sets"]),
    "a column": ("per_label: 4", "columns: {txt: label}", 7, ["columns.txt is no field of a row", "'text'?"]),
    "a column of the Hub": ("per_label: 4", "hub_columns: {txt: a}", 7, ["hub_columns.txt is no field of a row"]),
    "a brace": ("per_label: 4", 'columns: {text: "{a"}', 7, ["columns.text='{a'"]),
    "one file only": ("test: rows/test.jsonl\n", "", None, ["test is missing"]),
    "no name": ("name: fruit\n", "", None, ["name is missing"]),
    "no reward": ("per_label: 4", "scoring: preference", 8, ["training is without objective", "dpo"]),
    "no YAML": ("per_label: 4", "per_label: [4", 8, ["not valid YAML"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TYPOS)
def test_a_typo_is_one_line_with_file_line_field_and_the_nearest(own, name):
    right, wrong, line, phrases = TYPOS[name]
    assert right in OWN
    own.write_text(OWN.replace(right, wrong))
    with pytest.raises(PrefixMemoryError) as raised:
        load_task(str(own))
    message = str(raised.value)
    assert "\n" not in message and message.startswith(f"{own}, line {line}: " if line else f"{own}: ")
    for phrase in phrases:
        assert phrase in message, message


@pytest.mark.parametrize(
    ("changes", "phrases"),
    [
        ({"where": {"lable": "apple"}}, ["where names 'lable'", "'label'?"]),
        ({"where": {"label": "aple"}}, ["label='aple'", "'apple'?"]),
        ({"where": {"label": "apple"}, "longest_text": 1}, ["no row of the train split is left"]),
        ({"first_label": 3}, ["no row of the train split is left by where, first_label"]),
        (
            {"scoring": "number"},
            ["scoring='number' needs rows of the kind prompt or instruction", "is of the kind text"],
        ),
        ({"columns": {"prompt": "txt"}}, ["no column 'txt'", "'text'?"]),
        ({"columns": {"prompt": "text", "completion": "label"}}, ["per_label needs rows with 'text' and 'label'"]),
        ({"columns": {"prompt": "text", "completion": "label"}, "per_label": None, "labels": 2}, ["labels needs rows"]),
        ({"test": "rows/tset.jsonl"}, []),
        (
            {"columns": {"prompt": "text", "completion": "{text}\n{label}"}, "per_label": None},
            ["line 1 has an answer of several lines", "Use 'text' or 'loss'"],
        ),
        ({"train": None, "test": None, "folder": "mine"}, ["Task fruit: ", "mine", "Give --data"]),
    ],
)
def test_rows_that_do_not_fit_are_one_line(own, changes, phrases):
    task = load_task(str(own), changes)
    with pytest.raises(PrefixMemoryError) as raised:
        task.rows(own.parent if "folder" in changes else None, "test" if "test" in changes else "train")
    assert "\n" not in str(raised.value)
    for phrase in phrases:
        assert phrase in str(raised.value)


def test_a_bad_row_is_named_with_its_line(own):
    file = own.parent / "rows" / "train.jsonl"
    file.write_text(file.read_text() + json.dumps({"text": "x", "lable": "y"}) + "\n")
    with pytest.raises(PrefixMemoryError, match=r"train.jsonl, line 22: .*Did you mean 'label'\?"):
        load_task(str(own)).rows(None, "train")


def test_what_a_suite_changes_is_named_as_such(own):
    with pytest.raises(PrefixMemoryError, match="per_lable, which the suite changes: per_lable is no field of a task"):
        load_task(str(own), {"per_lable": 2})
    with pytest.raises(PrefixMemoryError, match="training, which the suite changes: epoch is no field"):
        load_task("banking77", {"training": {"epoch": 2}})


def test_a_task_that_is_not_there_is_named_with_the_nearest(tmp_path):
    with pytest.raises(PrefixMemoryError, match=r"no task 'gsm8'\. Did you mean 'gsm8k'\?"):
        load_task("gsm8")
    with pytest.raises(PrefixMemoryError, match=r"The task .*mine.yaml does not exist"):
        load_task(str(tmp_path / "mine.yaml"))


def test_an_objective_that_needs_trl_says_so_before_anything_runs(monkeypatch):
    monkeypatch.setattr("prefixmemory.training.preferences.find_spec", lambda name: None)
    with pytest.raises(PrefixMemoryError, match=r"objective='dpo' runs in TRL: pip install 'prefixmemory\[trl\]'"):
        load_task("ultrafeedback").check_installed()
    load_task("gsm8k").check_installed()


def test_validation_takes_no_row_that_training_asks_for(own):
    """21 rows of three labels, 4 of each to train on: 9 are left, however many are asked for."""
    task = load_task(str(own))
    for seed in range(5):
        split = task.split(None, 50, 5, seed)
        assert Counter(row["label"] for row in split.train) == {"apple": 4, "cherry": 4, "banana": 4}
        assert len(split.validation) == 9 and not [row for row in split.train if row in split.validation]
    assert len(task.split(None, 6, 5, 0).validation) == 6  # the control: as many as asked for, where there are


@pytest.mark.parametrize(
    ("changes", "train", "validation"),
    [({"limit": 15}, 15, 6), ({"limit": 30}, 17, 4), ({}, 17, 4)],
    ids=["some", "more than there are", "all"],
)
def test_training_on_all_rows_leaves_a_fifth_for_validation(own, changes, train, validation):
    split = load_task(str(own), {"per_label": None, **changes}).split(None, 50, 5, 0)
    assert (len(split.train), len(split.validation)) == (train, validation)


def test_a_task_that_trains_on_every_row_of_every_label_is_refused(own):
    task = load_task(str(own), {"per_label": 7})
    with pytest.raises(PrefixMemoryError, match="21 training rows and trains on all of them"):
        task.split(None, 50, 5, 0)
    assert len(task.split(None, 0, 5, 0).train) == 21


def test_a_task_may_be_made_in_python():
    task = Task("mine", 1, "", "CC0", hub="user/rows", training={"objective": "simpo"}, scoring="preference")
    assert task.settings().reward_scale == 2.0
