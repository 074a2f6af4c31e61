"""YAML, JSON and regular expressions that are made to take forever, or to fail where nobody looks: one line each."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from peft import LoraConfig

from prefixmemory import PrefixMemoryConfig, PrefixMemoryError
from prefixmemory.errors import did_you_mean
from prefixmemory.files.json_text import DEEPEST, parse_json, read_object
from prefixmemory.files.yaml_files import read_value, read_yaml
from prefixmemory.memories.patterns import check_patterns
from prefixmemory.rows.data import read_rows
from prefixmemory.training.methods import method_config
from prefixmemory.training.recipe import load_recipe

GOOD = "model: smollm2\noutput: out\ndata: {train: rows.jsonl}\n"


@pytest.fixture(autouse=True)
def _at_once() -> Iterator[None]:
    """No test here may take long: that is what they are about."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 8


def doubled(levels: int, join: str) -> str:
    """Each level holds the one before it twice."""
    lines = ["l0: &l0 {a: 1}"]
    lines += [f"l{n}: &l{n} " + join.format(f"*l{n - 1}") for n in range(1, levels)]
    return "\n".join(lines) + "\n"


YAML = {
    "alias_values": (doubled(40, "[{0}, {0}]"), "aliases written out"),
    "alias_maps": (doubled(40, "{{x: {0}, y: {0}}}"), "aliases written out"),
    "alias_merges": (doubled(40, "{{<<: [{0}, {0}]}}"), "aliases written out"),
    "alias_to_itself": ("model: &m [*m]\n", "refers to what it stands in"),
    "many_keys": ("".join(f"k{n}: {n}\n" for n in range(12_000)), "10,000 values"),
    "many_known_keys": ("data:\n" + "".join(f"  k{n}: {n}\n" for n in range(4_000)), "data.k0 is no field of a recipe"),
    "long_file": ("# comment\n" * 50_000, "larger than 200,000 bytes"),
    "deep_flow": ("model: " + "[" * 5_000, "more than 30 deep"),
    "deep_map": ("model: " + "{a: " * 5_000, "more than 30 deep"),
    "deep_block": ("".join(" " * n + "a:\n" for n in range(600)), "more than 30 deep"),
    "long_integer": (f"model: {'9' * 5_000}\n", "a number of more than 40 characters"),
    "long_hexadecimal": (f"model: 0x{'f' * 9_000}\n", "a number of more than 40 characters"),
    "long_sexagesimal": (f"model: 1{':59' * 3_000}\n", "a number of more than 40 characters"),
    "impossible_date": ("model: 2024-13-45\n", "'2024-13-45'"),
    "key_of_a_list": ("[a, b]: 1\n", "not valid YAML"),
}


@pytest.mark.parametrize("case", YAML)
def test_a_yaml_bomb_is_refused(tmp_path, case):
    text, problem = YAML[case]
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(PrefixMemoryError) as refused:
        load_recipe(file)
    assert problem in str(refused.value) and str(file) in str(refused.value)


def test_aliases_and_merges_of_an_honest_recipe_are_read(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{GOOD}training: &t {{epochs: 2}}\nmethod: {{rank: 4}}\n")
    assert load_recipe(file).training.epochs == 2
    file.write_text("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a\n")
    content, lines = read_yaml(file, "file: none", "a mapping")
    assert content == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1}}
    assert lines["a.x"] == 1 and lines["b.y"] == 2


@pytest.mark.parametrize("text", ["[" * 5_000, "9" * 5_000, "2024-13-45", "&a [*a]", "{a: [*b, *b]}"])
def test_a_value_of_the_command_line_is_read_within_the_same_limits(text):
    with pytest.raises(PrefixMemoryError, match="is no value that YAML knows") as refused:
        read_value(text)
    assert len(str(refused.value)) < 200


JSON = {
    "deep_list": "[" * 100_000 + "]" * 100_000,
    "deep_object": '{"a":' * 3_000 + "1" + "}" * 3_000,
    "a_little_too_deep": "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1),
    "long_integer": "9" * 5_000,
    "twice": '{"a": 1, "b": {"c": 2, "c": 2}}',
}


@pytest.mark.parametrize("case", JSON)
@pytest.mark.parametrize("kind", [str, str.encode])
def test_a_json_bomb_is_refused(case, kind):
    with pytest.raises(ValueError, match=r"deep|is given twice|digits"):
        parse_json(kind(JSON[case]))


def test_json_just_within_the_limit_is_read_and_brackets_in_texts_do_not_count():
    text = "[" * DEEPEST + "]" * DEEPEST
    assert json.dumps(parse_json(text)) == text
    assert parse_json(json.dumps({"a": "[" * 500})) == {"a": "[" * 500}


@pytest.mark.parametrize("case", JSON)
def test_a_json_bomb_in_a_data_file_names_its_line(tmp_path, case):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ' + JSON[case] + "}\n")
    with pytest.raises(PrefixMemoryError, match=r"rows\.jsonl, line 2: not complete JSON"):
        read_rows(file)


@pytest.mark.parametrize(
    ("content", "problem"), [(b"[1]", "holds list"), (b"{" + b" " * 10_000_001, "larger than 10 MB")]
)
def test_a_record_that_is_none_is_refused(tmp_path, content, problem):
    file = tmp_path / "run.json"
    file.write_bytes(content)
    with pytest.raises(PrefixMemoryError, match=rf"run\.json .*{problem}.* Delete it\."):
        read_object(file, "Delete it.")


def test_a_row_of_thousands_of_unknown_fields_is_refused_at_once(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({f"prompt number {n}": n for n in range(20_000)}) + "\n")
    with pytest.raises(PrefixMemoryError, match="has the fields"):
        read_rows(file)


def test_suggestions_are_made_for_words_not_for_texts():
    assert did_you_mean("promt", ["prompt"]) == " Did you mean 'prompt'?"
    assert did_you_mean("p" * 50_000, ["prompt"]) == ""
    assert did_you_mean("promt", ["prompt", "p" * 50_000]) == " Did you mean 'prompt'?"
    assert did_you_mean("promt", [f"promp{n}" for n in range(30_000)]) == ""


ENDLESS = [r"(a+)+b", r"(.*)*x", r"(a|b*)*c", r"(?:layers\.\d+\.?)+q", r"(a{1,9}){2,9}", r"((a+)b)*", r"(?=(a+)+)b"]
SOUND = [
    r".*layers\.(0|1)\.self_attn",
    r".*\.layers\.\d+\..*(q|v)_proj",
    r"(?:model\.)?layers\.\d+\.self_attn",
    "a{3}+",
    "|".join(["(attn)"] * 60),  # a group's number is no operation, whatever it is
]


@pytest.mark.parametrize("pattern", ENDLESS)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_a_pattern_that_nests_quantifiers_is_refused(pattern, field):
    with pytest.raises(PrefixMemoryError, match=f"^{field}=.* nests quantifiers"):
        PrefixMemoryConfig(**{field: pattern})


@pytest.mark.parametrize("pattern", SOUND)
def test_a_pattern_as_people_write_them_is_taken(pattern):
    assert PrefixMemoryConfig(target_modules=pattern).target_modules == pattern


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        (".*" * 7, "has 7 quantifiers without an end"),
        ("a" * 3_000, "longer than 2,000 characters"),
        ("(" * 900 + ")" * 900, "has 900 groups"),
        ("(" * 9, "not a valid regular expression"),
        ("a{99999999999}", "not a valid regular expression"),
    ],
)
def test_other_patterns_without_measure_are_refused(pattern, problem):
    with pytest.raises(PrefixMemoryError, match=problem):
        PrefixMemoryConfig(target_modules=pattern)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(a+)+b"},
        {"target_modules": ["q_proj"], "rank_pattern": {"(a+)+b": 4}},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["(a+)+b"]},
    ],
)
def test_the_patterns_of_another_method_are_looked_at_too(fields):
    with pytest.raises(PrefixMemoryError, match="nests quantifiers"):
        method_config({"name": "lora", **fields})


def test_a_list_of_names_is_no_pattern():
    check_patterns(LoraConfig(target_modules=["(a+)+b"]))


def test_files_of_configs_and_records_go_through_one_reader():
    package = Path(str(files("prefixmemory")))
    allowed = {"files/json_text.py", "training/record.py", "quickstart.py", "adapters/evaluate.py"}  # of our own text
    found = {str(f.relative_to(package)) for f in package.rglob("*.py") if "json.loads(" in f.read_text()}
    assert found <= allowed
