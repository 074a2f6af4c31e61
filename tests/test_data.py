"""Rows from files and from the Hub: every format gives the same rows, and a bad row is named before anything starts."""

from __future__ import annotations

import csv
import io
import json
import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

import tiny
from command_line import call, jsonl
from prefixmemory import PrefixMemoryError
from prefixmemory.rows.data import Data, read_rows, sample
from prefixmemory.rows.readers import hub_id
from prefixmemory.rows.rows import Row, check_objective, check_row, row_format

#: Commas, quotation marks, line breaks, tabs, letters beyond ASCII.
ROWS = [
    {"text": 'my "line", is dead,\nsince today', "label": "no connection"},
    {"text": "Grüße\taus Köln", "label": "other"},
    {"text": "plain", "label": "no connection"},
]


def separated(rows: list[dict[str, str]], delimiter: str = ",", end: str = "\r\n") -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


# Formats

WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "jsonl": (".jsonl", lambda file: jsonl(file, ROWS)),
    "jsonl, blank lines": (
        ".jsonl",
        lambda file: file.write_text("\n" + "\n\n".join(map(json.dumps, ROWS)) + "\n \n"),
    ),
    "jsonl, BOM": (".jsonl", lambda file: file.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8-sig")),
    "another suffix": (".txt", lambda file: jsonl(file, ROWS)),
    "csv": (".csv", lambda file: file.write_bytes(separated(ROWS))),
    "csv, unix": (".csv", lambda file: file.write_bytes(separated(ROWS, end="\n"))),
    "csv, BOM": (".csv", lambda file: file.write_bytes(b"\xef\xbb\xbf" + separated(ROWS))),
    "csv, blank lines": (
        ".csv",
        lambda file: file.write_bytes(separated(ROWS).replace(b"other\r\n", b"other\r\n\r\n\r\n")),
    ),
    "tsv": (".tsv", lambda file: file.write_bytes(separated(ROWS, "\t"))),
    "parquet": (".parquet", lambda file: parquet(file, ROWS)),
    "json array": (".json", lambda file: file.write_text(json.dumps(ROWS))),
    "json array, indented": (".json", lambda file: file.write_text("\n " + json.dumps(ROWS, indent=2))),
    "json array, UTF-16": (".json", lambda file: file.write_text(json.dumps(ROWS), encoding="utf-16")),
    "jsonl, UTF-16": (".jsonl", lambda file: file.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-16")),
    "csv, UTF-16": (".csv", lambda file: file.write_bytes(separated(ROWS).decode().encode("utf-16"))),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path, name):
    suffix, write = WRITERS[name]
    file = tmp_path / f"rows{suffix}"
    write(file)
    assert read_rows(file) == ROWS


def test_further_columns_are_kept_and_do_not_matter(tmp_path):
    rows = [{"text": "a", "label": "b", "id": 7, "source": None}]
    assert read_rows(jsonl(tmp_path / "rows.jsonl", rows)) == rows
    parquet(tmp_path / "rows.parquet", [{**rows[0], "source": "x"}])
    assert read_rows(tmp_path / "rows.parquet") == [{**rows[0], "source": "x"}]


def test_objects_with_other_fields_stay_what_they_are_in_parquet(tmp_path):
    """Arrow gives each object the fields of all rows'; a null there would be written into the prompt, and learned."""

    def row(name: str, argument: str) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": name, "arguments": {argument: "Paris"}}}
        tool = {"type": "function", "function": {"name": name, "parameters": {argument: {"type": "string"}}}}
        said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "tool_calls": [call]}]
        return {"messages": said, "tools": [tool]}

    rows = [row("weather", "city"), row("clock", "zone")]
    parquet(tmp_path / "rows.parquet", rows)
    assert pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pylist() != rows
    assert read_rows(tmp_path / "rows.parquet") == read_rows(jsonl(tmp_path / "rows.jsonl", rows))


def test_each_row_says_where_it_stands(tmp_path):
    (tmp_path / "rows.csv").write_bytes(separated(ROWS))
    parquet(tmp_path / "rows.parquet", ROWS)
    (tmp_path / "rows.jsonl").write_text("\n".join(["", json.dumps(ROWS[0]), "", json.dumps(ROWS[1])]))

    def places(name: str) -> list[str]:
        return [row.where.removeprefix(str(tmp_path / name)) for row in read_rows(tmp_path / name)]

    assert places("rows.csv") == [", line 2", ", line 4", ", line 5"]  # the first row spans two lines
    assert places("rows.parquet") == [", row 1", ", row 2", ", row 3"]
    assert places("rows.jsonl") == [", line 2", ", line 4"]


BAD_FILES = {
    "a missing cell": (".csv", b"text,label\na,b\nc\n", ["line 3", "has 1 cells where the header has 2", "comma"]),
    "a cell too many": (".csv", b"text,label\na,b\nc,d,e\n", ["line 3", "has 3 cells where the header has 2"]),
    "an open quotation": (".csv", b'text,label\na,b\n"c,d\ne,f\n', ["line 3", "not readable as CSV", "quotation mark"]),
    "a quotation within": (".csv", b'text,label\n"a" x,b\n', ["line 2", "not readable as CSV"]),
    "an empty cell": (".csv", b"text,label\na,b\nc,\n", ["line 3", "'label' is ''", "not empty"]),
    "two equal columns": (".csv", b"text,text\na,b\n", ["line 1", "two columns have the same name", "Rename one"]),
    "another separator": (".csv", b"text;label\na;b\n", ["line 2", "['text;label']", '"text" and "label"']),
    "a header alone": (".csv", b"text,label\n", ["is empty"]),
    "no header": (".csv", b"my line,dead\nc,d\n", ["line 2", "['dead', 'my line']"]),
    "Latin-1 in the header": (".csv", "text,größe\na,b\n".encode("latin-1"), ["line 1", "not UTF-8"]),
    "a number for a text": (".jsonl", b'{"text": 3, "label": "a"}\n', ["line 1", "'text' is 3", "must be a text"]),
    "a fraction for a label": (".jsonl", b'{"text": "a", "label": 0.5}\n', ["line 1", "'label' is 0.5"]),
    "an endless number": (".jsonl", b'{"text": "a", "label": ' + b"9" * 5000 + b"}\n", ["line 1", "not complete JSON"]),
    "an array that is cut off": (".json", b'[{"text": "a", "label": "b"},\n{"tex', ["line 2", "JSON array", "cut off"]),
    "an array of texts": (".json", b'["a", "b"]', ["row 1", "holds str, not an object"]),
    "an empty array": (".json", b"[]", ["is empty"]),
    "an object over several lines": (
        ".json",
        b'{\n "data": [\n {"text": "a", "label": "b"}\n ]\n}\n',
        ["is one JSON object over several lines, with the fields ['data']", "[row, row]"],
    ),
    "a table without its suffix": (".txt", b"text,label\na,b\n", ["begins with 'text,label', which is no JSON"]),
    "gzip": (".jsonl", b"\x1f\x8b\x08 and so on", ["packed as gzip", "unpack it"]),
    "UTF-16 without a mark": (".jsonl", '{"text": "a", "label": "b"}'.encode("utf-16-le"), ["save it as UTF-8"]),
    "half of UTF-16": (".jsonl", '{"text": "a"}'.encode("utf-16")[:-1], ["not complete UTF-16"]),
    "two lines for a label": (
        ".jsonl",
        b'{"text": "a", "label": "b\\nc"}\n',
        ["line 1", "'label' is 'b\\nc'", "by its first line"],
    ),
    "a judgement for some": (
        ".jsonl",
        b'{"prompt": "a", "completion": "b", "label": true}\n{"prompt": "a", "completion": "b", "label": "fine"}\n',
        ["line 2", "where the first row has ('prompt', 'completion', 'label')"],
    ),
    "no Parquet": (".parquet", b"PAR1 but not really", ["cannot be read as Parquet", "cut off"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_with_its_line(tmp_path, name):
    suffix, content, phrases = BAD_FILES[name]
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(content)
    with pytest.raises(PrefixMemoryError) as raised:
        read_rows(file)
    for phrase in [str(file), *phrases]:
        assert phrase in str(raised.value)


def test_rows_of_an_array_say_where_they_stand(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    assert [row.where for row in read_rows(tmp_path / "rows.json")] == [
        f"{tmp_path}/rows.json, row {i}" for i in (1, 2, 3)
    ]


def test_the_files_of_alpaca_are_read(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 + 2", "output": "3"},
        {"instruction": "Hi", "input": "", "output": "Hi"},
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows, indent=4))
    assert read_rows(tmp_path / "alpaca.json") == rows and row_format(rows) == "instruction"


def test_a_number_may_be_a_label(tmp_path):
    rows = jsonl(tmp_path / "rows.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": 12}])
    assert [row["label"] for row in read_rows(rows)] == ["0", "12"]


def test_a_cell_may_be_long(tmp_path):
    (tmp_path / "rows.csv").write_text(f"text,label\n{'a' * 200_000},b\n")
    assert len(read_rows(tmp_path / "rows.csv")[0]["text"]) == 200_000


@pytest.mark.parametrize("content", ["\n".join(map(json.dumps, ROWS)), json.dumps(ROWS)], ids=["lines", "array"])
def test_a_pipe_is_read(tmp_path, content):
    """Such as /dev/stdin, and what a shell makes of ``<(command)``."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_text, args=[content], daemon=True).start()
    assert read_rows(pipe) == ROWS


def test_a_cut_off_parquet_file_is_refused(tmp_path):
    file = tmp_path / "rows.parquet"
    parquet(file, ROWS)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(PrefixMemoryError, match="cannot be read as Parquet"):
        read_rows(file)


# Kinds of rows

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
KINDS = {
    "prompt": {"prompt": "a", "completion": "b"},
    "messages": {"messages": MESSAGES},
    "text": {"text": "a", "label": "b"},
    "instruction": {"instruction": "a", "output": "b", "input": ""},
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "judged": {"prompt": "a", "completion": "b", "label": False},
}
OBJECTIVES = {
    "sft": ("prompt", "messages", "text", "instruction"),
    "dpo": ("preference",),
    "kto": ("judged", "preference"),
    "simpo": ("preference",),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_of_a_row_is_known_by_its_fields_and_goes_with_its_objectives(kind):
    row = check_row("rows.jsonl, line 3", KINDS[kind])
    assert row_format([row]) == kind and row == KINDS[kind]
    for objective, kinds in OBJECTIVES.items():
        if kind in kinds:
            check_objective(objective, [row])
            continue
        with pytest.raises(PrefixMemoryError) as raised:
            check_objective(objective, [row])
        message = str(raised.value)
        assert f"objective={objective!r} needs rows with" in message and "rows.jsonl, line 3" in message
        offered = [
            other
            for other in OBJECTIVES
            if f"use objective={other!r}" in message or f"or objective={other!r}" in message
        ]
        assert offered and all(kind in OBJECTIVES[other] for other in offered)  # what it advises works


@pytest.mark.parametrize("written", [True, "true", "True"])
def test_a_judgement_may_be_written_as_a_word(written):
    assert check_row("", {**KINDS["judged"], "label": written})["label"] is True


def test_a_label_that_is_no_judgement_is_named(tmp_path):
    # With the fields of a judged row but 1 for its label, "has no label" would be untrue.
    rows = [Row({"prompt": "a", "completion": "b", "label": 1})]
    with pytest.raises(PrefixMemoryError, match=r"'label' is 1.*true or false"):
        check_objective("kto", rows)


# Columns


def test_columns_are_renamed_and_put_together(tmp_path):
    file = jsonl(tmp_path / "rows.jsonl", [{"question": "why?", "context": "It rains.", "answer": "so.", "n": 3}])

    def read(**columns: str) -> dict[str, Any]:
        return dict(read_rows(file, columns)[0])

    assert read(prompt="question", completion="answer") == {
        "prompt": "why?", "completion": "so.", "context": "It rains.", "n": 3,
    }  # fmt: skip
    assert read(prompt="{context}\n\n{question}", completion="{answer} ({n})") == {
        "prompt": "It rains.\n\nwhy?", "completion": "so. (3)",
    }  # fmt: skip
    assert read(prompt="{{{question}}}", completion="answer")["prompt"] == "{why?}"


def test_columns_may_change_places(tmp_path):
    file = jsonl(tmp_path / "rows.jsonl", [{"text": "no connection", "label": "my line is dead"}])
    assert read_rows(file, {"text": "label", "label": "text"}) == [
        {"text": "my line is dead", "label": "no connection"}
    ]
    assert read_rows(file, {"text": "{label}!", "label": "{text}"}) == [
        {"text": "my line is dead!", "label": "no connection"}
    ]


def test_a_column_that_went_into_another_means_nothing_by_its_own_name(tmp_path):
    # Else this row would be a judged one.
    file = jsonl(tmp_path / "rows.jsonl", [{"text": "is it so?", "label": "true"}])
    for template in ("label", "{label}"):
        rows = read_rows(file, {"prompt": "Question: {text}", "completion": template})
        assert rows == [{"prompt": "Question: is it so?", "completion": "true"}]
        assert row_format(rows) == "prompt"


def test_nothing_is_put_in_for_an_empty_column_and_lists_are_refused(tmp_path):
    file = jsonl(tmp_path / "rows.jsonl", [{"q": "why?", "context": None, "choices": ["a", "b"], "a": "so."}])
    assert read_rows(file, {"prompt": "{q}{context}", "completion": "a"})[0]["prompt"] == "why?"
    with pytest.raises(PrefixMemoryError, match=r"line 1: 'choices' holds list"):
        read_rows(file, {"prompt": "{q} {choices}", "completion": "a"})


@pytest.mark.parametrize("columns", [{"prompt": "qestion"}, {"prompt": "Q: {qestion}"}])
def test_a_column_that_is_not_there_is_named_with_the_nearest(tmp_path, columns):
    file = jsonl(tmp_path / "rows.jsonl", [{"question": "why?", "answer": "so."}])
    with pytest.raises(PrefixMemoryError, match=r"line 1: has no column 'qestion'.*Did you mean 'question'\?"):
        read_rows(file, {**columns, "completion": "answer"})


@pytest.mark.parametrize("template", ["{a.__class__}", "{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{a:{b}}", "{}", "{0}"])
def test_a_template_names_columns_and_does_nothing_else(tmp_path, template):
    file = jsonl(tmp_path / "rows.jsonl", [{"a": "xyz", "b": "9"}])
    with pytest.raises(PrefixMemoryError, match=r"write columns in braces as they are|has no column"):
        read_rows(file, {"prompt": template, "completion": "b"})


@pytest.mark.parametrize("template", ["{a", "{a}}", "{{a} }x}", "{a!}"])
def test_a_template_with_a_brace_too_many_is_refused_at_once(template):
    with pytest.raises(PrefixMemoryError, match=r"columns\.prompt=.*Write a column as \{name\}"):
        Data(train="rows.jsonl", columns={"prompt": template})


def test_a_field_that_rows_do_not_have_is_refused_at_once():
    with pytest.raises(PrefixMemoryError, match=r"columns\.promt is no field of a row\. Did you mean 'prompt'\?"):
        Data(train="rows.jsonl", columns={"promt": "question"})


# The Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """A data set with classes in place of the Hub; returns what was asked for."""
    asked: list[tuple[object, ...]] = []
    features = datasets.Features(
        {"question": datasets.Value("string"), "topic": datasets.ClassLabel(names=["weather", "sport"])}
    )

    def load_dataset(name: str, subset: str | None = None, split: str | None = None) -> datasets.Dataset:
        asked.append((name, subset, split))
        if split == "missing":
            raise ValueError('Unknown split "missing". Should be one of ["train", "test"].\nMore lines.')
        rows = [{"question": "rain?", "topic": 0}, {"question": "who won?", "topic": -1 if split == "hidden" else 1}]
        return datasets.Dataset.from_list(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


COLUMNS = {"text": "question", "label": "topic"}


def test_a_data_set_of_the_hub_has_the_names_of_its_classes(hub):
    data = Data("user/topics", "user/others", "small", "train[:2]", "test", COLUMNS)
    expected = [{"text": "rain?", "label": "weather"}, {"text": "who won?", "label": "sport"}]
    rows = data.training_rows(0)
    assert rows == expected and data.validation_rows(0) == expected
    assert hub == [("user/topics", "small", "train[:2]"), ("user/others", "small", "test")]
    assert rows[1].where == "user/topics (train[:2]), row 2"


def test_hidden_labels_are_refused(hub):
    with pytest.raises(PrefixMemoryError, match=r"user/topics \(hidden\), row 2: 'label' is -1"):
        read_rows("user/topics", COLUMNS, "hidden")


def test_a_data_set_that_cannot_be_loaded_says_why_in_one_line(hub):
    with pytest.raises(PrefixMemoryError, match='Unknown split "missing"') as raised:
        read_rows("user/topics", COLUMNS, "missing")
    assert "'user/topics' is no file here" in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_is_never_looked_for_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    jsonl(tmp_path / "user" / "topics", ROWS)
    assert read_rows("user/topics") == ROWS
    assert hub_id("user/topics") is None and hub_id("user/others") == "user/others"
    for name in ("user/rows.jsonl", "user/rows.csv", "rows", "a/b/c", "./rows"):
        assert hub_id(name) is None
        with pytest.raises(PrefixMemoryError, match="does not exist"):
            read_rows(name)
    assert hub == []


# Drawing rows

MANY = [Row(text=f"{i}", label="abc"[i % 3]) for i in range(60)]


def test_rows_are_drawn_by_the_seed_and_kept_in_order():
    for per_label, limit, count in ((4, None, 12), (None, 7, 7), (4, 5, 5), (1000, None, 60), (None, 1000, 60)):
        drawn = sample(MANY, per_label, limit, seed=3)
        assert len(drawn) == count and drawn == sample(list(MANY), per_label, limit, seed=3)
        numbers = [int(row["text"]) for row in drawn]
        assert numbers == sorted(set(numbers))
        assert (drawn != sample(MANY, per_label, limit, seed=4)) == (count < 60)
    assert sample(MANY, None, None, seed=1) == MANY


def test_so_many_rows_of_each_label_are_drawn():
    uneven = [*MANY, Row(text="60", label="d")]
    assert Counter(row["label"] for row in sample(uneven, 4, None, 0)) == {"a": 4, "b": 4, "c": 4, "d": 1}


def test_rows_without_labels_are_not_drawn_by_label():
    with pytest.raises(PrefixMemoryError, match=r"per_label=2 needs rows with 'text' and 'label'\. Use limit"):
        sample([Row(prompt="a", completion="b")], 2, None, 0)
    with pytest.raises(PrefixMemoryError, match="per_label=2 needs rows"):
        sample([Row(instruction="a", output="b", text="what Alpaca renders")], 2, None, 0)


def test_a_limit_holds_for_validation_rows_too(tmp_path):
    file = jsonl(tmp_path / "rows.jsonl", MANY)
    data = Data(str(file), str(file), per_label=5, limit=9)
    assert len(data.training_rows(0)) == 9 == len(data.validation_rows(0))
    assert len(Data(str(file), str(file), per_label=5).validation_rows(0)) == 60
    assert Data(str(file)).validation_rows(0) == []


# A bad row is named before anything starts

LINES = 5_000
GOOD = {
    "sft": {"text": "my line is dead", "label": "no connection"},
    "dpo": {"prompt": "why?", "chosen": "so.", "rejected": "no."},
    "kto": {"prompt": "why?", "completion": "so.", "label": True},
}


def long_file(file: Path, good: dict[str, object], bad: bytes | None, at: int = LINES) -> Path:
    """A file of ``LINES`` lines (and more) with ``bad`` as the one numbered ``at``."""
    if file.suffix == ".csv":
        lines = [",".join(good).encode(), *[",".join(map(str, good.values())).encode()] * LINES]
    else:
        lines = [json.dumps(good).encode()] * (LINES + 1)
    if bad is not None:
        lines[at - 1] = bad
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file


BAD_ROWS = {
    "cut off": ("sft", "rows.jsonl", b'{"text": "my line is de', "not complete JSON"),
    "no UTF-8": ("sft", "rows.jsonl", '{"text": "Köln", "label": "a"}'.encode("latin-1"), "not complete JSON"),
    "an empty label": ("sft", "rows.jsonl", b'{"text": "a", "label": " "}', "'label' is ' '"),
    "a misspelt field": ("sft", "rows.jsonl", b'{"text": "a", "labl": "b"}', "Did you mean 'label'?"),
    "another kind": ("sft", "rows.jsonl", b'{"prompt": "a", "completion": "b"}', "where the first row has"),
    "too long": (
        "sft", "rows.jsonl", json.dumps(GOOD["sft"] | {"label": "b" * 30}).encode(), "32 tokens, max_length is 20",
    ),
    "a lost cell": ("sft", "rows.csv", b"my line is dead", "has 1 cells where the header has 2"),
    "a lost quotation mark": ("sft", "rows.csv", b'"my line is dead,no connection', "not readable as CSV"),
    "no UTF-8 in a cell": ("sft", "rows.csv", "Köln,a".encode("latin-1"), "not UTF-8"),
    "a too long cell": ("sft", "rows.csv", b"a," + b"b" * 30, "32 tokens, max_length is 20"),
    "no answer to reject": ("dpo", "rows.jsonl", b'{"prompt": "why?", "chosen": "so."}', "has the fields"),
    "a too long answer": (
        "dpo", "rows.jsonl", json.dumps(GOOD["dpo"] | {"rejected": "n" * 30}).encode(), "31 tokens, max_length is 20",
    ),
    "no judgement": (
        "kto", "rows.jsonl", json.dumps(GOOD["kto"] | {"label": "maybe"}).encode(), "where the first row has",
    ),
}  # fmt: skip


class ModelIsLoaded(Exception):
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(tmp_path_factory.mktemp("data") / "base")


@pytest.fixture
def train(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``prefixmemory train`` that stops where the model would be loaded."""

    def load_model(*args: object) -> None:
        raise ModelIsLoaded

    monkeypatch.setattr("prefixmemory.training.run.load_model", load_model)
    common = ("--model", base, "--output", tmp_path / "new", "--max-length", 20, "--set", "method.active_from=start")
    return lambda data, *words: call("train", "--data", data, *common, *words)


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_on_line_5000_is_named_before_the_model_is_loaded(tmp_path, train, name):
    objective, file_name, bad, phrase = BAD_ROWS[name]
    file = long_file(tmp_path / file_name, GOOD[objective], bad)
    message = train(file, "--objective", objective).refusal
    assert f"{file}, line {LINES}: " in message and phrase in message
    assert list(tmp_path.iterdir()) == [file]  # nothing was written


@pytest.mark.parametrize(
    ("objective", "name"), [("sft", "rows.jsonl"), ("sft", "rows.csv"), ("dpo", "rows.jsonl"), ("kto", "rows.jsonl")]
)
def test_without_the_bad_row_the_model_is_loaded(tmp_path, train, objective, name):
    # The control of the refusals above.
    file = long_file(tmp_path / name, GOOD[objective], None)
    with pytest.raises(ModelIsLoaded):
        train(file, "--objective", objective)


def test_validation_rows_are_checked_as_early(tmp_path, train):
    good = jsonl(tmp_path / "good.jsonl", [GOOD["sft"]] * 3)
    bad = long_file(tmp_path / "rows.jsonl", GOOD["sft"], b"{")
    assert f"{bad}, line {LINES}: not complete JSON" in train(good, "--validation", bad).refusal
    long = long_file(tmp_path / "long.jsonl", GOOD["sft"], json.dumps({"text": "a", "label": "b" * 30}).encode())
    assert f"{long}, line {LINES}: the completion has 32 tokens" in train(good, "--validation", long).refusal


@pytest.mark.parametrize(
    ("kind", "objective"), [("preference", "sft"), ("judged", "sft"), ("text", "dpo"), ("prompt", "kto")]
)
def test_rows_of_another_objective_are_refused_before_the_model_is_loaded(tmp_path, train, kind, objective):
    file = jsonl(tmp_path / "rows.jsonl", [KINDS[kind]] * 3)
    assert f"objective={objective!r} needs rows with" in train(file, "--objective", objective).refusal
