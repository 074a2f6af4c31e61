"""Files whose fields are of a kind that nobody foresaw, files without an end, texts without measure: one line each."""

from __future__ import annotations

import copy
import datetime
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from peft import LoraConfig, get_peft_model

import tiny
from command_line import call, jsonl
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError
from prefixmemory.adapters.loading import load_adapter, read_record
from prefixmemory.files import pipes
from prefixmemory.rows import readers
from prefixmemory.rows import rows as row_checks
from prefixmemory.rows.data import read_rows
from prefixmemory.training.card import card_of
from prefixmemory.training.recipe import load_recipe

CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and an adapter of each of two methods."""
    folder = tmp_path_factory.mktemp("made")
    tiny.save_tiny(folder / "base")
    configs = {"memory": PrefixMemoryConfig(task_type="CAUSAL_LM"), "lora": LoraConfig(task_type="CAUSAL_LM")}
    for name, config in configs.items():
        model = get_peft_model(tiny.build(), copy.deepcopy(config))
        model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Callable[..., Path]:
    """An adapter whose config says ``fields`` beside, or in place of, what it said."""

    def make(method: str, **fields: object) -> Path:
        config = {**json.loads((made / method / CONFIG).read_text()), **fields}
        (tmp_path / "adapter_model.safetensors").write_bytes((made / method / "adapter_model.safetensors").read_bytes())
        (tmp_path / CONFIG).write_text(json.dumps(config))
        return tmp_path

    return make


FIELDS: dict[str, dict[str, object]] = {
    "a list for the base model": {"base_model_name_or_path": ["a"]},
    "a number for the base model": {"base_model_name_or_path": 7},
    "half a character for the base model": {"base_model_name_or_path": "\ud800"},
    "a pattern for a module": {"modules_to_save": ["(", "*"]},
    "a number for a module": {"modules_to_save": [7]},
    "a text for modules": {"modules_to_save": "lm_head"},
    "a number for targets": {"target_modules": 7},
    "lists for targets": {"target_modules": [["a"]]},
    "an endless pattern for targets": {"target_modules": "(a+)+b"},
    "a word for layers": {"layers_to_transform": "a"},
    "a list for the task": {"task_type": ["X"]},
    "a list for the method": {"peft_type": ["X"]},
    "a method that is none": {"peft_type": "X"},
}
OF_A_MEMORY = {
    "a scale without measure": {"scale": 10**400},
    "a scale that no tensor takes": {"scale": 10**30},
    "a rank without measure": {"rank": 10**9},
    "a word for the rank": {"rank": "8"},
    "a mapping for the feature map": {"feature_map": {}},
    "a list for the memory": {"memory": ["x"]},
    "a text for options": {"memory_options": "x"},
}
OF_LORA = {
    "a rank without measure": {"r": 10**9},
    "a word for the rank": {"r": "8"},
    "a list for a pattern": {"rank_pattern": [1]},
    "a number for a bias": {"bias": 7},
    "a word for the dropout": {"lora_dropout": "x"},
}
CASES = [("memory", name, fields) for name, fields in {**FIELDS, **OF_A_MEMORY}.items()]
CASES += [("lora", name, fields) for name, fields in {**FIELDS, **OF_LORA}.items()]


@pytest.mark.parametrize(("method", "name", "fields"), CASES, ids=[f"{method}: {name}" for method, name, _ in CASES])
@pytest.mark.usefixtures("untyped")
def test_a_config_with_a_field_of_another_kind_is_refused_and_its_file_named(adapter, method, name, fields):
    folder = adapter(method, **fields)
    with pytest.raises(PrefixMemoryError) as refused:
        load_adapter(str(folder))
    assert str(folder / CONFIG) in str(refused.value)


@pytest.mark.parametrize("method", ["memory", "lora"])
def test_the_configs_of_these_tests_load_unspoilt(adapter, method):
    load_adapter(str(adapter(method, revision=None)))


RECORDS: dict[str, dict[str, Any]] = {
    "dtype": {"dtype": ["x"]},
    "metrics": {"metrics": [1]},
    "settings": {"settings": 7},
    "data": {"data": 7},
    "quantization": {"quantization": {}},
    "method": {"method": 1},
}


@pytest.mark.parametrize("field", RECORDS)
def test_a_record_with_a_field_of_another_kind_is_refused(tmp_path, field):
    (tmp_path / "run.json").write_text(json.dumps(RECORDS[field]))
    with pytest.raises(PrefixMemoryError, match=rf"run\.json: {field}=.* is not what a run writes"):
        read_record(tmp_path)


def test_a_card_of_a_record_that_no_run_wrote_is_refused(tmp_path):
    with pytest.raises(
        PrefixMemoryError, match=r"run\.json or adapter_config\.json beside it holds what no run writes"
    ):
        card_of(tmp_path, {"data": [], "versions": [1], "settings": {}})


# Rows

BEYOND: dict[str, pa.Array] = {
    "a second beyond all dates": pa.array([2**40], pa.timestamp("s")),
    "a duration": pa.array([2**62], pa.duration("s")),
    "a day": pa.array([2**31 - 1], pa.date32()),
    "a day in milliseconds": pa.array([2**62], pa.date64()),
    "a time zone": pa.array([1], pa.timestamp("s", tz="Nowhere/X")),
    "no UTF-8": pa.array([b"\xff\xfe"]).view(pa.string()),
}


@pytest.mark.parametrize("name", BEYOND)
def test_a_column_that_python_has_no_values_for_is_refused(tmp_path, name):
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"], "x": BEYOND[name]}), file)
    with pytest.raises(PrefixMemoryError, match=f"{file} cannot be read as Parquet"):
        read_rows(file)


def test_dates_as_people_have_them_are_no_obstacle(tmp_path):
    file, day = tmp_path / "rows.parquet", datetime.datetime(2024, 1, 31)
    pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"], "x": pa.array([day])}), file)
    assert read_rows(file)[0]["prompt"] == "a"


HALVES = {
    "role": '{"messages": [{"role": "\\ud800", "content": "a"}, {"role": "assistant", "content": "b"}]}',
    "content": '{"messages": [{"role": "user", "content": "\\udfff"}, {"role": "assistant", "content": "b"}]}',
    "key": '{"prompt": "a", "completion": "b", "\\uD800": "x"}',
    "field beside": '{"instruction": "a", "output": "b", "input": "\\ud800"}',
}


@pytest.mark.parametrize("place", HALVES)
def test_half_a_character_is_refused_wherever_it_stands(tmp_path, place):
    file = tmp_path / "rows.jsonl"
    file.write_text(HALVES[place] + "\n")
    with pytest.raises(PrefixMemoryError, match=r"rows\.jsonl, line 1: not complete JSON \(.* is half of a pair"):
        read_rows(file)


def test_both_halves_are_a_character(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "\\ud83d\\ude00", "completion": "b"}\n')
    assert read_rows(file)[0]["prompt"] == "😀"


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_row_without_measure_is_refused(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(readers, "LONGEST_ROW", 1000)
    monkeypatch.setattr(row_checks, "LONGEST_TEXT", 1000)
    file = tmp_path / f"rows.{suffix}"

    def write(length: int) -> None:
        row = {"prompt": "a" * length, "completion": "b"}
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist([row]), file)
        else:
            file.write_text(json.dumps(row) if suffix == "jsonl" else f"prompt,completion\n{row['prompt']},b\n")

    write(900)
    assert len(read_rows(file)) == 1
    write(2000)
    with pytest.raises(
        PrefixMemoryError, match=r"line 1: has more than|field larger than|has a text of more than 1,000"
    ):
        read_rows(file)


def test_an_array_of_rows_may_be_one_long_line(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_ROW", 100)
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"prompt": "a", "completion": "b"}] * 50))
    assert len(read_rows(file)) == 50


# What is no file


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/urandom", "/dev/null"])
def test_a_device_is_refused(device):
    with pytest.raises(PrefixMemoryError, match=f"{device} is a device, and no file"):
        read_rows(device)
    with pytest.raises(PrefixMemoryError, match=device):
        load_recipe(Path(device))


def test_a_pipe_that_nobody_writes_into_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(pipes, "PATIENCE", 0.2)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PrefixMemoryError, match="is a pipe that nobody writes into"):
        read_rows(tmp_path / "pipe")


def test_a_pipe_with_a_name_is_read_when_its_program_comes(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    later = threading.Timer(0.3, jsonl, (tmp_path / "pipe", [{"prompt": "a", "completion": "b"}] * 3))
    later.start()
    assert len(read_rows(tmp_path / "pipe")) == 3
    later.join()


def test_a_pipe_that_does_not_end_is_given_up(monkeypatch):
    monkeypatch.setattr(pipes, "LARGEST", 50_000)
    read, write = os.pipe()
    os.write(write, b"a" * 60_000)
    with pytest.raises(PrefixMemoryError, match="does not end"):
        pipes.read_pipe(Path(f"/dev/fd/{read}"))
    os.close(read)
    os.close(write)


def test_an_empty_pipe_is_an_empty_file():
    read, write = os.pipe()
    os.close(write)
    assert pipes.read_pipe(Path(f"/dev/fd/{read}")) == b""
    os.close(read)


# What is asked of a model


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_prompt_that_the_model_cannot_read_is_refused(made, command):
    prompt = "a" * 100_000
    words = ("--prompt", prompt) if command == "generate" else ()
    answer = call(command, made / "memory", *words, stdin=f"{prompt}\n")
    said = r"The prompt has 100,00\d tokens, and the base model reads 512 at most"
    assert re.search(said, answer.out + answer.err) and len(answer.out + answer.err) < 1000


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_half_a_character_in_a_prompt_is_refused(made, command):
    words = ("--prompt", "a\udcff") if command == "generate" else ()
    answer = call(command, made / "memory", *words, stdin="a\udcff\n")
    assert r"A text holds '\udcff', which is no character" in answer.out + answer.err


def test_more_tokens_than_the_model_reads_are_refused_and_fewer_are_what_is_left(made):
    words = ("generate", made / "memory", "--prompt", "a" * 505, "--max-new-tokens")
    assert "max_new_tokens=99999999 is out of range: the base model reads 512" in call(*words, 99999999).refusal
    call(*words, 400).success  # noqa: B018


@pytest.mark.parametrize("option", ["--tokens", "--length"])
def test_an_instrument_without_measure_is_refused(made, tmp_path, option):
    words = ("inspect", made / "memory", "--output", tmp_path / "x", option, 99999999)
    assert "=99999999 is out of range: give 16 to 1,000,000 tokens" in call(*words).refusal


# Recipes

RECIPES = {
    "NUL in the output": ('output: "a\\0b"', "a NUL character"),
    "half a character in the output": ('output: "\\ud800"', "surrogates not allowed"),
    "a list for the method": ("output: o\nmethod: {name: [lora]}", "method.name=['lora'] is not known"),
    "a mapping for the method": ("output: o\nmethod: {name: {a: 1}}", "method.name={'a': 1} is not known"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_with_a_value_of_another_kind_names_its_line(tmp_path, case):
    text, problem = RECIPES[case]
    file = tmp_path / "r.yaml"
    file.write_text(f"model: m\ndata: {{train: d.jsonl}}\n{text}\n")
    with pytest.raises(PrefixMemoryError) as refused:
        load_recipe(file)
    assert problem in str(refused.value) and f"{file}, line" in str(refused.value)


def test_an_attention_that_there_is_not_is_refused_in_a_dry_run_too(made, tmp_path):
    rows = jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    words = ("train", "--model", made / "base", "--data", rows, "--output", tmp_path / "o", "--set", "attention=flash")
    assert '"flash"' in call(*words, "--dry-run").refusal


# Whatever else


def boom(*args: object, **kwargs: object) -> None:
    raise ZeroDivisionError("\x1b[31mnobody\nforesaw")


def test_what_nobody_foresaw_is_one_line_with_a_place(monkeypatch):
    monkeypatch.setattr("prefixmemory.adapters.loading.load_adapter", boom)
    monkeypatch.delenv("PREFIXMEMORY_TRACEBACK")
    message = call("generate", "x", "--prompt", "a").refusal
    assert message.startswith("ZeroDivisionError in use.py, line ") and r"\x1b[31mnobody foresaw" in message
    assert "PREFIXMEMORY_TRACEBACK=1" in message
    monkeypatch.setenv("PREFIXMEMORY_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        call("generate", "x", "--prompt", "a")


def test_a_full_disk_under_any_command_is_one_line(monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr("prefixmemory.adapters.loading.load_adapter", full)
    assert "Is the disk full?" in call("generate", "x", "--prompt", "a").refusal
