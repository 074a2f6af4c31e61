"""Recipes: those that ship are valid as they stand, and a typo names its line, the field and the nearest valid one."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig

import tiny
from command_line import call, files_of, jsonl, weights
from prefixmemory import PrefixMemoryConfig
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.files.yaml_files import read_value
from prefixmemory.rows.invocation import settle
from prefixmemory.training.methods import RECOMMENDED, method_config
from prefixmemory.training.recipe import Recipe, load_recipe
from prefixmemory.training.settings import TrainingSettings
from prefixmemory_cli.recipes import shipped

SHIPPED = sorted(shipped())
#: Rows that each recipe says it is for.
ROWS = {
    "classification": {"text": "my line is dead", "label": "no connection"},
    "instructions": {"instruction": "Translate.", "input": "Hallo", "output": "Hello"},
    "lora": {"text": "my line is dead", "label": "no connection"},
    "preferences": {"prompt": "why?", "chosen": "so.", "rejected": "no."},
    "quantized": {"prompt": "why?", "completion": "so."},
}


def errors_of(file: Path, *words: object) -> str:
    return call("recipes", "validate", file, *words).refusal


# The recipes of the package


def test_ls_lists_every_recipe_with_its_summary():
    lines = call("recipes", "ls").success.splitlines()
    assert [line.split()[0] for line in lines] == SHIPPED == sorted(ROWS)
    for line in lines:
        name, _, said = line.partition(" ")
        first = (files("prefixmemory") / "recipes" / f"{name}.yaml").read_text().splitlines()[0]
        assert first == f"# {said.strip()}" and len(said.strip()) > 20


@pytest.mark.parametrize("name", SHIPPED)
def test_cp_copies_byte_for_byte_and_never_overwrites(tmp_path, name):
    file = tmp_path / "new folder" / "mine.yaml"
    assert f"prefixmemory train {file}" in call("recipes", "cp", name, file).success
    assert file.read_bytes() == (files("prefixmemory") / "recipes" / f"{name}.yaml").read_bytes()
    file.write_text("mine")
    assert f"{file} exists already" in call("recipes", "cp", name, file).refusal
    assert "exists already" in call("recipes", "cp", name, tmp_path).refusal
    assert files_of(tmp_path) == {"new folder/mine.yaml": b"mine"}


def test_cp_of_an_unknown_recipe_names_the_nearest(tmp_path):
    message = call("recipes", "cp", "clasification", tmp_path / "x.yaml").refusal
    assert "Did you mean 'classification'?" in message and all(name in message for name in SHIPPED)
    assert not list(tmp_path.iterdir())


def test_cp_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    assert f"{tmp_path / 'file'} is a file" in call("recipes", "cp", "lora", tmp_path / "file" / "x.yaml").refusal


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A shipped recipe as ``recipes cp`` leaves it, beside the data file that it names."""
    monkeypatch.chdir(tmp_path)
    call("recipes", "cp", request.param, "mine.yaml").success  # noqa: B018
    jsonl(tmp_path / "train.jsonl", [ROWS[request.param]] * 6)
    return Path("mine.yaml")


@pytest.mark.parametrize("copied", SHIPPED, indirect=True)
def test_a_shipped_recipe_is_valid_as_it_stands(copied):
    assert call("recipes", "validate", copied).success == "mine.yaml is valid: 6 rows to train on.\n"


@pytest.mark.parametrize("copied", SHIPPED, indirect=True)
def test_what_a_shipped_recipe_has_in_comments_is_valid_too(copied):
    text, fields = copied.read_text(), r"^( *)# (\w+: (?:\d+|[\w.]+|\{.*?\}))( +#.*)?$"
    comments = re.findall(fields, text, re.MULTILINE)
    for indent, field, _ in comments:
        (name,) = yaml.safe_load(field)
        section = re.findall(r"^(\w+):$", text[: text.index(f"# {field}")], re.MULTILINE)[-1]
        one = re.sub(rf"^{indent}# {re.escape(field)}", indent + field, text, flags=re.MULTILINE)
        assert one != text
        copied.write_text(one)
        recipe = load_recipe(copied)
        assert name in (recipe.method if section == "method" else vars(getattr(recipe, section)))
    assert len(comments) == one_line_comments(text)


def one_line_comments(text: str) -> int:
    """Lines that hold nothing but a comment below the first field."""
    return sum(line.strip().startswith("#") for line in text.partition("\nmodel:")[2].splitlines())


@pytest.mark.filterwarnings(r"ignore:`gradient_checkpointing(_\w+)?` is deprecated:FutureWarning")  # TRL 1.16
@pytest.mark.parametrize("copied", SHIPPED, indirect=True)
def test_a_shipped_recipe_trains(copied, request):
    """On a tiny model, with nothing else changed."""
    recipe = load_recipe(copied)
    needed = {"dpo": "trl", "bnb-4bit": "bitsandbytes"}
    for choice in (recipe.training.objective, recipe.quantization):
        if choice in needed and find_spec(needed[choice]) is None:
            pytest.skip(f"{needed[choice]} is not installed")
    tiny.save_tiny(Path("base"))
    assert "Trained" in call("train", copied, "--model", "base").success
    record = json.loads((Path(recipe.output) / "run.json").read_text())
    for name, value in record["settings"].items():
        assert value == getattr(recipe.training, name)
    assert record["method"] == recipe.method["name"]
    assert any(tensor.abs().max() > 0 for tensor in weights(Path(recipe.output)).values())


# Reading

WRITTEN = """\
# A comment, so that lines and fields do not agree by chance.
model: base
output: out

data:
  train: rows.jsonl

method:
  name: {method}

training:
  epochs: 2   # passes
  seed: 7
"""
TEXT = WRITTEN.format(method="prefix_memory")
LORA = WRITTEN.format(method="lora") + "  learning_rate: 1e-3\n"


def write(folder: Path, text: str) -> Path:
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    return folder / "mine.yaml"


def below(section: str, line: str, text: str = TEXT) -> str:
    """``text`` with ``line`` as the first one of a section."""
    return text.replace(f"{section}:\n", f"{section}:\n  {line}\n")


def test_a_recipe_holds_what_was_written(tmp_path):
    text = below("training", "warmup: 0.2\n  learning_rate: 1e-3", below("method", "rank: 8"))
    recipe = load_recipe(write(tmp_path, text + "dtype: float32\nreport_to: [tensorboard]\n"))
    assert (recipe.model, recipe.output, recipe.data.train, recipe.dtype) == ("base", "out", "rows.jsonl", "float32")
    assert recipe.training == TrainingSettings(epochs=2, seed=7, warmup=0.2, learning_rate=0.001)
    assert recipe.report_to == ["tensorboard"] and recipe.attention is None
    config = recipe.config()
    assert isinstance(config, PrefixMemoryConfig) and config.rank == 8 and config.task_type == "CAUSAL_LM"


def test_every_field_of_a_recipe_is_described():
    for kind in (
        Recipe,
        type(load_recipe(None, {"model": "a", "output": "b", "data.train": "c"}).data),
        TrainingSettings,
    ):
        described = re.findall(r"^\s+((?:\w+, )*\w+): ", kind.__doc__, re.MULTILINE)
        named = {name for names in described for name in names.split(", ")}
        assert set(kind.__dataclass_fields__) <= named


NUMBERS = {
    "1e-3": 1e-3, "1E-3": 1e-3, "1.e-3": 1e-3, "2.5e+2": 250.0, ".5e-3": 5e-4, "-1e3": -1000.0, "1e3": 1000.0,
    "0.001": 0.001, "3": 3, "1e": "1e", "e-3": "e-3", "1e-3x": "1e-3x", "elu": "elu", "[q, v]": ["q", "v"],
    "": None, "null": None, "'3'": "3", "true": True,
}  # fmt: skip


@pytest.mark.parametrize("written", NUMBERS)
def test_values_are_read_as_people_write_them(tmp_path, written):
    assert read_value(written) == NUMBERS[written] and type(read_value(written)) is type(NUMBERS[written])
    if isinstance(NUMBERS[written], float) and NUMBERS[written] > 0:
        recipe = load_recipe(write(tmp_path, below("training", f"learning_rate: {written}")))
        assert recipe.training.learning_rate == NUMBERS[written]


def test_sections_without_a_line_and_aliases_are_allowed(tmp_path):
    text = TEXT.replace("  epochs: 2   # passes\n  seed: 7", "  # epochs: 2")
    assert load_recipe(write(tmp_path, text)).training == TrainingSettings()
    recipe = load_recipe(write(tmp_path, TEXT.replace("model: base", "model: &name base").replace("out\n", "*name\n")))
    assert recipe.output == "base"


def test_a_recipe_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "mine.yaml").write_text(TEXT, encoding="utf-8-sig")
    assert load_recipe(tmp_path / "mine.yaml").training.seed == 7


# Typos: text, line, and what the message must say

TYPOS = {
    # a field that does not exist
    "top": (TEXT.replace("output:", "ouput:"), 3, ["ouput is no field", "Did you mean 'output'?"]),
    "section": (TEXT.replace("training:", "trainig:"), 11, ["trainig is no field", "Did you mean 'training'?"]),
    "data": (below("data", "validaton: x"), 6, ["data.validaton", "Did you mean 'validation'?"]),
    "training": (below("training", "learning_rat: 1"), 12, ["training.learning_rat", "Did you mean 'learning_rate'?"]),
    "memory": (below("method", "feature_mpa: elu"), 9, ["method.feature_mpa", "prefix_memory", "'feature_map'?"]),
    "lora": (below("method", "lora_alfa: 8", LORA), 9, ["method.lora_alfa", "of lora", "Did you mean 'lora_alpha'?"]),
    "name of method": (TEXT.replace("  name:", "  nmae:"), 9, ["method.nmae", "Did you mean 'name'?"]),
    "nothing near": (TEXT + "zzzzzz: 1\n", 14, ["zzzzzz is no field", "At the top there are: model, output, data"]),
    "columns": (below("data", "columns: {promt: a}"), 6, ["data.columns.promt", "Did you mean 'prompt'?"]),
    "columns over lines": (
        below("data", "columns:\n    prompt: a\n    competion: b"), 8, ["data.columns.competion", "'completion'?"],
    ),
    # a field in the wrong place
    "of training, at the top": (TEXT + "learning_rate: 1\n", 14, ["Did you mean 'training.learning_rate'?"]),
    "of method, at the top": (TEXT + "rank: 1\n", 14, ["Did you mean 'method.rank'?"]),
    "of data, at the top": (TEXT + "train: rows.jsonl\n", 14, ["Did you mean 'data.train'?"]),
    "of lora, at the top": (LORA + "r: 1\n", 15, ["Did you mean 'method.r'?"]),
    "of training, in data": (below("data", "epochs: 1"), 6, ["data.epochs", "Did you mean 'training.epochs'?"]),
    "of training, in method": (below("method", "seed: 1"), 9, ["method.seed", "Did you mean 'training.seed'?"]),
    "of method, in training": (below("training", "rank: 1"), 12, ["training.rank", "Did you mean 'method.rank'?"]),
    "of the top, in training": (below("training", "dtype: auto"), 12, ["training.dtype", "'dtype' at the top?"]),
    "of memory, in lora": (below("method", "feature_map: elu", LORA), 9, ["method.feature_map is no field of lora"]),
    # a value of the wrong type
    "a word for a number": (below("training", "warmup: some"), 12, ["training.warmup='some'", "valid number"]),
    "a word for a whole number": (below("training", "batch_size: two"), 12, ["training.batch_size='two'", "integer"]),
    "a fraction": (below("training", "batch_size: 1.5"), 12, ["training.batch_size=1.5", "integer"]),
    "yes for a number": (below("training", "patience: yes"), 12, ["training.patience=True", "valid number"]),
    "a list for a number": (below("training", "warmup: [1]"), 12, ["training.warmup=[1]", "valid number"]),
    "a number for a name": (TEXT.replace("model: base", "model: 7"), 2, ["model=7", "valid string"]),
    "a word for yes or no": (below("training", "keep_best: maybe"), 12, ["training.keep_best='maybe'", "boolean"]),
    "a word for a list": (TEXT + "report_to: tensorboard\n", 14, ["report_to='tensorboard'", "list"]),
    "a text for a section": (
        TEXT.replace("data:\n  train: rows.jsonl", "data: rows.jsonl"), 5, ["data is 'rows.jsonl'", "section"],
    ),
    "a number for a column": (below("data", "columns: {prompt: 3}"), 6, ["data.columns.prompt=3", "valid string"]),
    "a word for a rank": (below("method", "rank: eight"), 9, ["method.rank='eight'", "integer"]),
    "a word for a share": (below("method", "dropout: some"), 9, ["method.dropout='some'", "valid number"]),
    "a word for a choice": (below("method", "share_heads: maybe"), 9, ["method.share_heads='maybe'", "boolean"]),
    "a word for lora's rank": (below("method", "r: eight", LORA), 9, ["method.r='eight'", "integer"]),
    "a word for lora's dropout": (below("method", "lora_dropout: some", LORA), 9, ["method.lora_dropout='some'"]),
    # a value that does not exist, or out of range
    "objective": (below("training", "objective: dop"), 12, ["training.objective='dop'", "'dpo'?", "sft, dpo, kto"]),
    "precision": (below("training", "mixed_precision: bf61"), 12, ["mixed_precision='bf61'", "Did you mean 'bf16'?"]),
    "dtype": (TEXT + "dtype: bflaot16\n", 14, ["dtype='bflaot16'", "Did you mean 'bfloat16'?"]),
    "quantization": (TEXT + "quantization: bnb-4bits\n", 14, ["Did you mean 'bnb-4bit'?", "torchao-int8"]),
    "tracker": (TEXT + "report_to:\n  - wandb\n  - tensorbord\n", 14, ["'tensorbord'", "Did you mean 'tensorboard'?"]),
    "method": (TEXT.replace("prefix_memory", "prefix_memroy"), 9, ["method.name='prefix_memroy'", "'prefix_memory'?"]),
    "feature map": (below("method", "feature_map: elo"), 9, ["feature_map='elo'", "Did you mean 'elu'?"]),
    "rank": (below("method", "rank: 0"), 9, ["rank=0 is out of range"]),
    "range": (below("training", "learning_rate: -1"), 12, ["training.learning_rate=-1", "above 0"]),
    "limit": (below("data", "limit: 0"), 6, ["data.limit=0", "above 0"]),
    "one row a step for kto": (
        below("training", "objective: kto\n  batch_size: 1"), 13, ["training.batch_size=1", "kto needs 2"],
    ),
    "a template": (below("data", 'columns: {prompt: "{a!r}"}'), 6, ["data.columns.prompt='{a!r}'", "as they are"]),
    # what belongs together
    "best of nothing": (below("training", "keep_best: true"), 12, ["keep_best needs validation data"]),
    "a split of nothing": (below("data", "validation_split: test"), 6, ["validation_split needs data.validation"]),
    "patience with nothing": (below("training", "patience: 2"), 12, ["patience needs validation data"]),
    "prefix tuning": (WRITTEN.format(method="prefix_tuning"), 8, ["method.num_virtual_tokens is missing"]),
    # YAML
    "twice": (TEXT + "model: other\n", 14, ["model is given twice", "Delete one"]),
    "twice in a section": (below("training", "seed: 1"), 14, ["training.seed is given twice"]),
    "an open list": (TEXT + "report_to: [wandb\ndtype: auto\n", 15, ["not valid YAML"]),
    "a tab": (TEXT.replace("  seed", "\tseed"), 13, ["not valid YAML", "'\\t'"]),
    "an open quotation mark": (TEXT + "dtype: 'auto\n", 15, ["not valid YAML"]),
    "two documents": (TEXT + "---\nmodel: b\n", 14, ["not valid YAML"]),
    "a control character": (TEXT + "dtype: \x00\n", 14, ["not valid YAML"]),
    "a Python object": (TEXT + "dtype: !!python/name:os.system\n", 14, ["not valid YAML"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TYPOS)
def test_a_typo_names_its_line_and_the_nearest_valid_field(tmp_path, name):
    text, line, phrases = TYPOS[name]
    file = write(tmp_path, text)
    message = errors_of(file)
    assert message.startswith(f"{file}, line {line}: ")
    for phrase in phrases:
        assert phrase in message


PROPOSALS = [name for name, (_, _, phrases) in TYPOS.items() if any("?" in phrase for phrase in phrases)]


@pytest.mark.parametrize("name", PROPOSALS)
def test_what_a_message_proposes_is_valid(tmp_path, name):
    text = TYPOS[name][0]
    message = errors_of(write(tmp_path, text))
    value = re.search(r"='([\w-]+)' is not known\. Did you mean '([\w-]+)'\?", message)
    if value:
        load_recipe(write(tmp_path, text.replace(value[1], value[2])))
        return
    wrong, right, top = re.search(r"([\w.]+) is no field .*Did you mean '([\w.]+)'( at the top)?\?", message).groups()
    *sections, field = wrong.split(".")
    content = section = yaml.safe_load(text)
    for inner in sections:
        section = section[inner]
    value = section.pop(field)
    path = right if "." in right or top else ".".join([*sections, right])
    load_recipe(write(tmp_path, yaml.safe_dump(content)), {path: value})


EMPTY = {"nothing": "", "comments": "# nothing yet\n", "a list": "- model: a\n- output: b\n", "a word": "hello\n"}


@pytest.mark.parametrize("name", EMPTY)
def test_a_file_that_is_no_recipe_says_what_a_recipe_is(tmp_path, name):
    file = write(tmp_path, EMPTY[name])
    assert errors_of(file) == f"{file}: a recipe is a mapping with model, data and output; this is none."


def test_a_file_that_is_not_utf8_names_the_line(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(TEXT.encode() + "# größer\n".encode("latin-1"))
    assert f"{tmp_path / 'mine.yaml'}, line 14: not UTF-8" in errors_of(tmp_path / "mine.yaml")


def test_an_alias_within_itself_is_refused(tmp_path):
    assert "an alias" in errors_of(write(tmp_path, TEXT + "dtype: &a {b: *a}\n"))


@pytest.mark.parametrize(("name", "problem"), [("nowhere.yaml", "does not exist"), (".", "is a folder")])
def test_a_recipe_that_is_no_file_says_where_to_find_one(tmp_path, name, problem):
    message = errors_of(tmp_path / name)
    assert f"{problem}. " in message and "recipes ls" in message and "recipes cp NAME FILE" in message


@pytest.mark.parametrize("field", ["model", "output", "data", "data.train"])
def test_a_missing_field_says_how_to_give_it(tmp_path, field):
    text = {
        "model": TEXT.replace("model: base\n", ""),
        "output": TEXT.replace("output: out\n", ""),
        "data": TEXT.replace("data:\n  train: rows.jsonl\n", ""),
        "data.train": TEXT.replace("train: rows.jsonl", "limit: 3"),
    }[field]
    message = errors_of(write(tmp_path, text))
    option = f"--{field.partition('.')[0]}"
    assert f"{field} is missing: give it in the recipe, or {option}." in message
    # and that is true
    load_recipe(write(tmp_path, text), {"data.train" if option == "--data" else field: "given"})


# Options and --set over a recipe


def test_options_win_over_the_recipe(tmp_path):
    file = write(tmp_path, below("method", "rank: 8"))
    recipe = load_recipe(
        file, {"model": "other", "training.epochs": 5, "method.rank": 2, "data.limit": 3, "dtype": "float32"}
    )
    assert (recipe.model, recipe.output, recipe.training.epochs, recipe.training.seed) == ("other", "out", 5, 7)
    assert (recipe.config().rank, recipe.data.limit, recipe.data.train, recipe.dtype) == (2, 3, "rows.jsonl", "float32")


RATE = {"training.learning_rate": 1e-3}


def test_a_run_that_says_nothing_of_its_method_trains_the_recommended_one(tmp_path):
    """What it says goes on top of that; another kind of memory, or another method, has nothing of it."""
    written = "model: base\noutput: out\ndata: {train: rows.jsonl}\n"
    files = {
        "none": written,
        "comments": f"{written}method:\n  # rank: 4\n",
        "given": f"{written}method: {{rank: 4}}\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    options = {"model": "base", "output": "out", "data.train": "rows.jsonl"}
    for recipe in (load_recipe(None, options), load_recipe(tmp_path / "none"), load_recipe(tmp_path / "comments")):
        assert recipe.method == RECOMMENDED and recipe.training.learning_rate == 3e-3
        assert (recipe.config().feed_forward, recipe.config().active_from, recipe.config().rank) == (8, "auto", 8)
        for template, found in {True: "question", False: "start"}.items():
            config = recipe.config()
            settle(config, tiny.tokenizer(chat=template), [{"prompt": "why?", "completion": "so"}])
            assert config.active_from == found and bool(config.invocation_tokens) == template
    with pytest.raises(PrefixMemoryError, match="cannot be told from the tokens"):
        asked = [{"prompt": "why?", "completion": "so"}]
        settle(method_config({"active_from": "question"}), tiny.tokenizer(chat=False), asked)
    assert load_recipe(tmp_path / "given").method == {"rank": 4}
    assert load_recipe(tmp_path / "none", {"method.rank": 4}).method == {**RECOMMENDED, "rank": 4}
    inside = {"method.placement": "inside", "method.prefix_length": 4}
    assert load_recipe(tmp_path / "none", inside).config().feed_forward is None
    lora = load_recipe(tmp_path / "none", {"method.name": "lora", "training.learning_rate": 1e-3})
    assert lora.method == {"name": "lora"}


def test_another_method_does_not_get_the_fields_of_the_first(tmp_path):
    file = write(tmp_path, below("method", "rank: 8"))
    config = load_recipe(file, {"method.name": "lora", "method.r": 4, **RATE}).config()
    assert isinstance(config, LoraConfig) and config.r == 4
    file = write(tmp_path, below("method", "r: 16", LORA))
    assert isinstance(load_recipe(file, {"method.name": "prefix_memory"}).config(), PrefixMemoryConfig)
    assert load_recipe(file, {"method.name": "lora"}).config().r == 16


def test_another_method_needs_a_learning_rate_of_its_own(tmp_path):
    memory = write(tmp_path, below("training", "learning_rate: 2e-3"))
    for overrides in ({"method.name": "lora"}, {"method.name": "ia3"}):
        with pytest.raises(PrefixMemoryError, match="learning_rate is missing: that of a memory would not suit"):
            load_recipe(memory, overrides)
    written = "model: base\noutput: out\ndata: {train: rows.jsonl}\ntraining: {learning_rate: 2e-3}\n"
    silent = write(tmp_path, written)
    assert load_recipe(silent).method == RECOMMENDED
    with pytest.raises(PrefixMemoryError, match="learning_rate is missing: that of a memory would not suit"):
        load_recipe(silent, {"method.name": "lora"})  # without a method, it is the memory's, too
    memory = write(tmp_path, below("training", "learning_rate: 2e-3"))
    assert load_recipe(memory, {"method.name": "lora", **RATE}).training.learning_rate == 1e-3
    assert load_recipe(memory).training.learning_rate == 2e-3  # control
    lora = write(tmp_path, LORA)
    assert load_recipe(lora).training.learning_rate == 1e-3
    assert load_recipe(lora, {"method.name": "prefix_memory"}).training.learning_rate == TrainingSettings.learning_rate
    with pytest.raises(PrefixMemoryError, match=r"line 9: training\.learning_rate is missing"):
        load_recipe(write(tmp_path, WRITTEN.format(method="lora")))


def test_the_same_method_named_again_keeps_its_fields(tmp_path):
    file = write(tmp_path, TEXT.replace("  name: prefix_memory", "  rank: 8"))  # prefix_memory is the default
    assert load_recipe(file, {"method.name": "prefix_memory"}).config().rank == 8


OPTIONS = {
    "--learning-rate": ("often", "training.learning_rate='often'"),
    "--epochs": ("-1", "training.epochs=-1"),
    "--objective": ("dop", "Did you mean 'dpo'?"),
    "--method": ("prefix_memroy", "Did you mean 'prefix_memory'?"),
    "--feature-map": ("elo", "Did you mean 'elu'?"),
    "--rank": ("eight", "method.rank='eight'"),
    "--dtype": ("float23", "Did you mean 'float32'?"),
    "--quantization": ("bnb", "Choose one of: bnb-4bit"),
    "--report-to": ("tensorbord", "Did you mean 'tensorboard'?"),
    "--set training.lerning_rate": ("1", "Did you mean 'learning_rate'?"),
    "--set trainign.seed": ("1", "Did you mean 'training'?"),
    "--set method.learning_rate": ("1", "Did you mean 'training.learning_rate'?"),
    "--set training.seed.more": ("1", "seed is 7, so training.seed.more cannot be set"),
    "--set training.warmup": ("2", "training.warmup=2"),
    "--set data": ("rows.jsonl", "data is 'rows.jsonl'"),
    "--set data.columns.promt": ("a", "Did you mean 'prompt'?"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_wrong_option_is_named_in_place_of_a_line(tmp_path, option):
    value, phrase = OPTIONS[option]
    words = option.split()
    words = ["--set", f"{words[1]}={value}"] if words[0] == "--set" else [option, value]
    message = call("train", write(tmp_path, TEXT), *words).refusal
    assert message.startswith(f"{option}: ") and phrase in message


def test_the_value_that_won_is_the_one_that_is_named(tmp_path):
    """The recipe has a seed of its own, which is right."""
    words = ("--set", "training.seed=-1")
    assert call("train", write(tmp_path, TEXT), *words).refusal.startswith("--set training.seed: ")


@pytest.mark.parametrize("word", ["training.seed", "=3", "training.seed:3"])
def test_set_needs_a_field_and_a_value(tmp_path, word):
    assert f"--set {word}: write it as FIELD=VALUE" in call("train", write(tmp_path, TEXT), "--set", word).refusal


def test_without_a_recipe_the_options_are_everything():
    assert call("train", "--model", "base").refusal == "output is missing: give it in the recipe, or --output."


# validate


def test_validate_counts_rows_and_loads_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "rows.jsonl", [{"text": f"{i}", "label": "ab"[i % 2]} for i in range(1200)])
    jsonl(tmp_path / "held.jsonl", [{"text": "x", "label": "a"}] * 9)
    file = write(tmp_path, below("data", "validation: held.jsonl"))  # the model "base" does not exist
    assert call("recipes", "validate", file).success == f"{file} is valid: 1,200 rows to train on, 9 for validation.\n"
    file = write(tmp_path, below("data", "per_label: 16"))
    assert call("recipes", "validate", file).success == f"{file} is valid: 32 rows to train on.\n"
    with (tmp_path / "rows.jsonl").open("a") as stream:
        stream.write('{"text": "x"}\n')
    assert "rows.jsonl, line 1201: has the fields ['text']" in errors_of(file)
    jsonl(tmp_path / "rows.jsonl", [{"prompt": "x", "chosen": "a", "rejected": "b"}])
    assert "objective='sft' needs rows with" in errors_of(write(tmp_path, TEXT))


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("--gradient-accumulation", 0, "training.gradient_accumulation=0"),
        ("--scheduler", "cosin", "training.scheduler='cosin'"),
        ("--limit", 0, "data.limit=0"),
    ],
)
def test_an_option_of_train_sets_its_field(tmp_path, option, value, field):
    message = call("train", "--model", "m", "--data", "d.jsonl", "--output", tmp_path / "o", option, value).refusal
    assert message.startswith(f"{option}: {field}")


def test_a_recipe_may_be_given_as_an_option(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model: m\noutput: o\ndata: {train: d}\nfrobnicate: 1\n")
    assert f"{file}, line 4" in call("train", "--config", file).refusal
    assert "are two recipes" in call("train", file, "--config", file).refusal
