"""The commands: every example of every --help is run as it stands, wrong words end in one line, a dry run is true."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import AutoModelForCausalLM, TrainerCallback

import prefixmemory.adapters.hub
import tiny
from command_line import call, call_line, files_of, jsonl, work_in_copy
from prefixmemory import quickstart
from prefixmemory.models.loading import load_model
from prefixmemory.rows.data import northline
from prefixmemory_cli.app import app

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # here a folder
TICKETS = [{"text": f"line {i} is dead" + "!" * (i % 5), "label": "abc"[i % 3]} for i in range(24)]
RECIPE = f"model: {MODEL}\noutput: tickets-memory-2\ndata:\n  train: tickets.jsonl\n"
TASK = r"""
task: tickets
dataset_path: json
dataset_kwargs:
  data_files: {test: tickets-test.jsonl}
test_split: test
output_type: multiple_choice
doc_to_text: "Text: {{text}}\nLabel:"
doc_to_target: label
doc_to_choice: [a, b, c]
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1}
"""


COMPARED = """
name: tickets
version: 1
description: Which team answers.
licence: ours
train: tickets.jsonl
test: tickets-test.jsonl
per_label: 1
"""
SUITE = f"""
name: tickets-suite
model: {MODEL}
tasks: [compared.yaml]
methods: [base]
seeds: [0]
validation_rows: 3
test_rows: 6
"""


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command that is not hidden, by the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        elif not command.hidden:
            yield (*path, name)


COMMANDS = sorted(commands(typer.main.get_command(app)))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples speak of: base model, data, recipe, a trained memory, a task of one's own."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny.save_tiny(folder / MODEL)
        jsonl(folder / "tickets.jsonl", TICKETS)
        jsonl(folder / "tickets-test.jsonl", TICKETS[:6])
        (folder / "tickets.yaml").write_text(RECIPE)
        (folder / "my-tasks").mkdir()
        (folder / "my-tasks" / "tickets.yaml").write_text(TASK)
        (folder / "compared.yaml").write_text(COMPARED)
        (folder / "suite.yaml").write_text(SUITE)
        call("train", "--model", MODEL, "--data", "tickets.jsonl", "--output", "tickets-memory").success  # noqa: B018
    return folder


@pytest.fixture
def place(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to work in."""
    return work_in_copy(prepared, tmp_path, monkeypatch)


# Help


def test_the_commands_are_found():
    # Else the tests of every command could be tests of none.
    assert {("train",), ("evaluate",), ("generate",), ("chat",), ("push",), ("quickstart",)} <= set(COMMANDS)
    assert {("recipes", "ls"), ("recipes", "cp"), ("recipes", "validate")} <= set(COMMANDS)
    assert ("remeasure",) not in COMMANDS


def examples_of(command: tuple[str, ...]) -> list[str]:
    return re.findall(r"^ *Example: (.*)$", call(*command, "--help").success, re.MULTILINE)


@pytest.fixture
def _no_network(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is pushed, and the quickstart has a small model and few rows."""
    pushed = lambda folder, to, private: f"https://huggingface.co/{to}/{len(list(Path(folder).iterdir()))}"  # noqa: E731
    monkeypatch.setattr(prefixmemory.adapters.hub, "push_adapter", pushed)
    monkeypatch.setattr(quickstart, "smollm2", lambda: MODEL)
    monkeypatch.setattr(quickstart, "northline", lambda split: northline(split)[:14])
    monkeypatch.setattr(quickstart, "fast_dtype", lambda: "float32")
    monkeypatch.setattr(quickstart, "quickstart", partial(quickstart.quickstart, again=False))
    tiny.reads(place / MODEL, 4096)  # examples of 14 labels stand in front of a row


#: What an example must leave or say, by a part of it.
EFFECTS: dict[str, Callable[[str], bool]] = {
    "quickstart": lambda out: Path("my-first-memory/adapter_model.safetensors").is_file() and "everything" in out,
    "--output tickets-memory": lambda out: Path("tickets-memory/run.json").is_file() and "tickets-memory" in out,
    "--dry-run": lambda out: "trainable parameters" in out and not Path("tickets-memory-2").exists(),
    "evaluate tickets-memory --data": lambda out: "rows 6" in out and "perplexity" in out,
    "--tasks": lambda out: re.search(r"^tickets: acc +[\d.]+ +[\d.]+$", out, re.MULTILINE) is not None,
    "--output tickets-compared": lambda out: out.count("tickets-compared/tickets-suite.") == 3,
    "generate": lambda out: out.startswith("base model: ") and "\nwith memory: " in out,
    "chat": lambda out: len(out) > 1,
    "push": lambda out: out == "Uploaded to https://huggingface.co/my-name/tickets-memory/4\n",
    "tickets-inspected": lambda out: any(Path("tickets-inspected").glob("*.html")),
    "tickets-tradeoff": lambda out: Path("tickets-tradeoff/tradeoff.png").stat().st_size > 10_000,
    "tickets-long": lambda out: Path("tickets-long/long-input.png").stat().st_size > 10_000,
    "--port 8000": lambda out: "--lora-modules {'name': 'tickets'" in out and out.endswith("--port 8000\n"),
    "--folder .": lambda out: "'name': 'same'" in out and "--max-loras 10" in out,
    "recipes ls": lambda out: "classification" in out,
    "recipes cp": lambda out: Path("my-tickets.yaml").is_file(),
    "recipes validate": lambda out: "24 rows to train on" in out,
}


@pytest.fixture
def _vllm_only_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    """``serve`` says what it would start; that it works there, tests/in_vllm shows."""
    monkeypatch.setattr("prefixmemory.serving.server.find_spec", lambda name: name)
    monkeypatch.setattr("os.execve", lambda file, words, env: print(" ".join(words).replace('"', "'")))


@pytest.mark.usefixtures("_no_network", "_vllm_only_prints")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of lm-evaluation-harness's imports
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_an_example_that_runs(place, command):
    examples = examples_of(command)
    assert examples
    for example in examples:
        assert f"prefixmemory {' '.join(command)}" in example
        if "--output tickets-memory" in example:
            shutil.rmtree("tickets-memory")  # there was one for the other examples
        answer = call_line(example)
        assert answer.code == 0, answer.err
        assert not re.search("Traceback|error:", answer.err)
        (effect,) = [effect for part, effect in EFFECTS.items() if part in example]
        assert effect(answer.out), answer.out


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_option_says_what_it_is_for(command):
    lines = re.findall(r"^  (?=--)(?:\S+(?: <\S+>)?) *(.*)$", call(*command, "--help").success, re.MULTILINE)
    assert lines and all(len(line) > 10 for line in lines)


# Wrong words

WRONG = {
    "trian": "No such command 'trian'. Did you mean 'train'?",
    "recipes lss": "Did you mean 'ls'?",
    "recipes cp": "Missing argument 'name'",
    "recipes cp a b c": "unexpected extra argument",
    "train --lerning-rate 3": "--learning-rate",
    "train --epochs": "requires an argument",
    "train a.yaml b.yaml": "unexpected extra argument",
    "evaluate": "give one trained adapter",
    "evaluate x --adapter y --data z": "give one trained adapter",
    "evaluate --adapter x --limit few": "--limit",
    "generate --adapter x": "Missing option '--prompt'",
    "generate --adapter x --prompt a --max-new-tokens lots": "--max-new-tokens",
    "chat --adapter x --temperature warm": "--temperature",
    "push --adapter x": "Missing option '--to'",
    "push --to a/b": "give one trained adapter",
    "quickstart --seed x": "--seed",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_word_is_one_line_and_exit_code_2(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = call(*words.split())
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error: ") and answer.err.count("\n") == 1 and WRONG[words] in answer.err
    # what it points to exists
    advised = re.search(r"`prefixmemory (.*--help)` lists what there is\.$", answer.err).group(1)
    assert "Usage:" in call(*advised.split()).success
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [(), ("recipes",)])
def test_a_group_without_a_command_shows_its_help(words):
    answer = call(*words)
    assert answer.code == 2 and answer.err.startswith("Usage: prefixmemory") and answer.err.count("\n") > 5
    assert answer.err.rstrip() == call(*words, "--help").success.rstrip()


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        ("train nowhere.yaml", "nowhere.yaml does not exist"),
        ("recipes validate nowhere.yaml", "nowhere.yaml does not exist"),
        ("generate --adapter nowhere --prompt a", "nowhere does not exist"),
        ("generate --adapter ./nowhere --prompt a", "./nowhere does not exist"),
        ("chat --adapter nowhere", "nowhere does not exist"),
        ("chat --adapter nowhere --temperature -1", "temperature=-1"),
        ("chat --adapter nowhere --max-new-tokens 0", "max_new_tokens=0"),
        ("evaluate --adapter nowhere --data x.jsonl", "nowhere does not exist"),
        ("push --adapter nowhere --to a/b", "nowhere holds no adapter"),
    ],
)
def test_what_is_not_there_is_one_line_and_exit_code_1(words, phrase, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert phrase in call(*words.split()).refusal
    assert not list(tmp_path.iterdir())


# Options whose value is a name


@pytest.mark.parametrize("name", ["2024-01-01", "1e3", "exp #3", "a: b", "[draft]", "null"])
def test_a_name_is_taken_as_it_is_written(place, name):
    """Values of other options are read as YAML, which would make numbers, dates and comments of these."""
    jsonl(place / f"{name}.jsonl", TICKETS[:8])
    words = ("train", "--model", MODEL, "--data", f"{name}.jsonl", "--validation", f"{name}.jsonl", "--output", name)
    assert shown(call(*words, "--dry-run").success)["rows"].startswith("8 to train on, 8 for validation")
    call(*words, "--epochs", 1).success  # noqa: B018
    assert (place / name / "adapter_model.safetensors").is_file()


# Waiting

LOADING = {
    "train": (f"--model {MODEL} --data tickets.jsonl --output new --epochs 1", "prefixmemory.training.run", MODEL),
    "evaluate": (
        "--adapter tickets-memory --data tickets-test.jsonl", "prefixmemory.adapters.loading",
        "tickets-memory and its base model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("terminal", [True, False], ids=["in a terminal", "in a log"])
@pytest.mark.parametrize("command", LOADING)
def test_what_is_loaded_is_said_before_it_is(place, monkeypatch, command, terminal):
    words, module, what = LOADING[command]
    said = []

    def load_model_late(*args, **options):
        said.append(sys.stderr.getvalue())
        return load_model(*args, **options)

    monkeypatch.setattr(f"{module}.load_model", load_model_late)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")  # how rich is told so
    assert call(command, *words.split()).success
    assert said == [f"Loading {what} ...\n"]


# A dry run


class Steps(TrainerCallback):
    """Counts the steps of a real run."""

    def __init__(self) -> None:
        self.count = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1


def shown(out: str) -> dict[str, str]:
    return {line[:12].strip(): line[12:] for line in out.splitlines()}


def number(text: str, unit: str) -> int:
    return int(re.search(rf"([\d,]+) {unit}", text).group(1).replace(",", ""))


RATE = ("--learning-rate", "1e-3")  # methods other than a memory have no default
RUNS = {
    "memory": (),
    "memory of rank 2": ("--rank", 2, "--set", "method.layers_to_transform=[1]"),
    "memory, mlp": ("--feature-map", "mlp", "--set", "method.share_heads=true"),
    "lora": ("--method", "lora", *RATE),
    "lora everywhere": ("--method", "lora", *RATE, "--set", "method.target_modules=all-linear", "--set", "method.r=3"),
    "prefix tuning": ("--method", "prefix_tuning", *RATE, "--set", "method.num_virtual_tokens=5"),
    "prompt tuning": ("--method", "prompt_tuning", *RATE, "--set", "method.num_virtual_tokens=5"),
    "ia3": ("--method", "ia3", *RATE),
    "part of an epoch": ("--epochs", 1.1, "--batch-size", 5, "--set", "training.gradient_accumulation=2"),
    "dpo": ("--objective", "dpo", "--data", "pairs.jsonl", "--batch-size", 4, "--epochs", 1),
    "kto from pairs": ("--objective", "kto", "--data", "pairs.jsonl", "--batch-size", 4, "--epochs", 1),
}


@pytest.mark.filterwarnings(r"ignore:`gradient_checkpointing(_\w+)?` is deprecated:FutureWarning")  # TRL 1.16
@pytest.mark.parametrize("name", RUNS)
def test_a_dry_run_counts_what_the_run_trains_and_writes_nothing(place, monkeypatch, name):
    if "pairs.jsonl" in RUNS[name]:
        pytest.importorskip("trl")
        jsonl(place / "pairs.jsonl", [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(9)])
    words = ("train", "--model", MODEL, "--data", "tickets.jsonl", "--output", "new", *RUNS[name])
    before = files_of(place)
    plan = shown(call(*words, "--dry-run").success)
    assert files_of(place) == before

    steps = Steps()
    monkeypatch.setattr("prefixmemory.training.run.show_progress", lambda console: steps)
    out = call(*words).success
    assert number(plan["method"], "trainable parameters") == number(out, "parameters") > 0
    assert number(plan["rows"], "to train on") == number(out, "rows")
    assert number(plan["steps"], "on one device") == steps.count


def test_a_dry_run_tells_of_model_rows_and_modules(place):
    words = ("train", "--model", MODEL, "--data", "tickets.jsonl", "--output", "new", "--dry-run")
    plan = shown(call(*words, "--validation", "tickets-test.jsonl", "--max-length", 22).success)
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    assert plan["base model"] == f"{(place / MODEL).resolve()}, {base.num_parameters():,} parameters, frozen"
    assert plan["method"].startswith("prefix_memory, 4,864 trainable parameters (17.02 %)")
    assert plan["modules"].startswith("8 (512 to 640 parameters each): model.layers.0.self_attn ... model.layers.1.")
    # "Text: line 10 is dead\nLabel:" and " a<eos>"
    lengths = [len(f"Text: {row['text']}\nLabel: {row['label']}") + 1 for row in [*TICKETS, *TICKETS[:6]]]
    assert plan["rows"] == (
        f"24 to train on, 6 for validation; longest 22 tokens, {sum(n > 22 for n in lengths)} rows lose the beginning "
        "of their prompt"
    )
    assert f"longest {max(lengths)} tokens" in shown(call(*words).success)["rows"]
    assert plan["memory"].startswith("0.00 GiB: weights ")


def test_a_dry_run_refuses_what_the_run_would_refuse(place):
    words = ("train", "--model", MODEL, "--data", "tickets.jsonl", "--output", "new")
    for wrong, phrase in (
        (("--max-length", 3), "tickets.jsonl, line 1: the completion has 3 tokens"),
        (("--method", "lora", *RATE, "--set", "method.target_modules=[q_prj]"), "lora cannot be attached to Llama"),
        (("--method", "lora", *RATE, "--set", "method.r=0"), "should be a positive integer"),
        (("--method", "lora"), "training.learning_rate is missing: that of a memory would not suit lora."),
        (("--set", "method.target_modules=[self_atn]"), "Did you mean 'self_attn'?"),
        (("--model", "nowhere"), "'nowhere' cannot be loaded"),
        (("--objective", "dpo"), "objective='dpo' needs rows"),
    ):
        assert phrase in call(*words, *wrong, "--dry-run").refusal
        assert phrase in call(*words, *wrong).refusal
    assert not list(place.glob("new*"))


@pytest.mark.usefixtures("_vllm_only_prints")
@pytest.mark.parametrize("words", [("other",), ("--model", "other")], ids=" ".join)
def test_the_server_takes_its_base_model_from_either_place(place, words):
    said = call("serve", *words, "--adapter", "tickets=tickets-memory", "--dtype", "float32").success
    assert "--served-model-name other" in said and said.strip().endswith("--dtype float32")


@pytest.mark.usefixtures("_vllm_only_prints")
def test_a_base_model_at_a_path_is_asked_for_by_its_last_part_too(place):
    said = call("serve", "--adapter", "tickets=tickets-memory").success
    assert re.search(r" --served-model-name SmolLM2-135M-Instruct /\S+/SmolLM2-135M-Instruct --", said)
    taken = call("serve", "--adapter", "SmolLM2-135M-Instruct=tickets-memory").success  # by an adapter
    assert re.search(r" --served-model-name /\S+/SmolLM2-135M-Instruct --", taken)


@pytest.mark.usefixtures("_vllm_only_prints")
@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("other", "--model", "more"), "Two base models are named"),
        (("--adapter", "tickets-memory"), "has no name: give NAME=PATH"),
        (("--adapter", "a=tickets-memory", "--adapter", "a=tickets-memory"), "names 'a' twice"),
        (("--adapter", "a=nowhere"), "nowhere"),
        (("--adapter", "../a=tickets-memory"), "cannot be the name of a file"),
        (("--adapter", "a=tickets-memory", "--folder", "nowhere"), "is no folder"),
        (("--slots", "4"), "No base model is named"),
        (("--without-vllm",), "serves one memory"),
        (("--without-vllm", "--adapter", "a=tickets-memory", "--slots", "4"), "none of --folder, --slots"),
        (("--without-vllm", "--adapter", "a=nowhere"), "nowhere"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_one_line(place, words, problem):
    assert problem in call("serve", *words).refusal
