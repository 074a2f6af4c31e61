"""``prefixmemory evaluate``: figures equal an independent computation, and an adapter that does nothing gets none."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

import tiny
from close import close_figures
from command_line import call, files_of, jsonl, save_talker, work_in_copy
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError
from prefixmemory.adapters.evaluate import Scores, rows_to_score, save_metrics
from prefixmemory.adapters.loading import load_adapter
from prefixmemory.rows.invocation import invocation_tokens
from prefixmemory.training.card import is_ours
from prefixmemory.tuner.layers import set_scale

TOKENIZER = tiny.tokenizer()
#: Texts of unlike lengths, so that batches are padded.
TICKETS = [{"text": f"line {i} is dead" + " again" * (i % 5), "label": "abc"[i % 3]} for i in range(24)]
TEST = [{"text": f"phone {i}" + " rings" * (i % 4), "label": "abca"[i % 4]} for i in range(10)]
QUESTIONS = [{"prompt": "why" + "?" * i, "completion": "so" + "!" * (i % 3)} for i in range(7)]
MESSAGES = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
    for row in QUESTIONS
]
METHODS = {
    # a base model of random weights says nothing to hold on to
    "memory": ("--set", "method.output_limit=null", "--set", "method.active_from=start"),
    "lora": ("--method", "lora", "--set", "method.target_modules=all-linear"),
    "prompt_tuning": ("--method", "prompt_tuning", "--set", "method.num_virtual_tokens=4"),
    "prefix_tuning": ("--method", "prefix_tuning", "--set", "method.num_virtual_tokens=4"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, an adapter of each method, and test rows of each kind."""
    folder = tmp_path_factory.mktemp("made")
    save_talker(folder / "base")
    for name, rows in (("tickets", TICKETS), ("test", TEST), ("questions", QUESTIONS), ("messages", MESSAGES)):
        jsonl(folder / f"{name}.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, words in METHODS.items():
            common = ("--data", "tickets.jsonl", "--output", name, "--learning-rate", 0.03, "--epochs", 6)
            call("train", "--model", "base", "--dtype", "float32", *common, *words).success  # noqa: B018
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # bfloat16 where it is fast would make the comparisons coarse
    monkeypatch.setattr("prefixmemory.adapters.loading.fast_dtype", lambda: "float32")
    return work_in_copy(made, tmp_path, monkeypatch)


def models(folder: str) -> tuple[nn.Module, nn.Module]:
    base = AutoModelForCausalLM.from_pretrained("base")
    return base, PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), folder).eval()


def rendered(row: dict[str, str]) -> tuple[str, str]:
    """Prompt and completion, written out."""
    if "text" in row:
        return f"Text: {row['text']}\nLabel:", f" {row['label']}<eos>"
    return f"<|user|>{row['prompt']}<eos><|assistant|>", f"{row['completion']}<eos>"


def log_likelihood(model: nn.Module, prompt: str, completion: str) -> float:
    """Of the tokens of ``completion``, one row alone, without padding."""
    ids, answer = TOKENIZER(prompt + completion)["input_ids"], TOKENIZER(completion)["input_ids"]
    with torch.no_grad():
        scores = log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -len(answer) - 1 : -1], -1)
    return float(scores[range(len(answer)), answer].sum())


def loss_of(model: nn.Module, rows: list[dict[str, str]]) -> float:
    """Mean negative log-likelihood of the completions' tokens."""
    total = sum(log_likelihood(model, *rendered(row)) for row in rows)
    return -total / sum(len(TOKENIZER(rendered(row)[1])["input_ids"]) for row in rows)


def answer_of(model: nn.Module, row: dict[str, str]) -> str:
    """First line of the likeliest text, one token at a time."""
    ids = TOKENIZER(rendered(row)[0])["input_ids"]
    length = len(ids)
    while len(ids) < length + 8 and ids[-1] != TOKENIZER.eos_token_id:
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    lines = TOKENIZER.decode(ids[length:], skip_special_tokens=True).splitlines()
    return next((line.strip() for line in lines if line.strip()), "")


def evaluate(adapter: str, data: str, *words: object) -> dict[str, object]:
    """What the command wrote with ``--output``."""
    file = Path("figures.json")
    file.unlink(missing_ok=True)
    call("evaluate", "--adapter", adapter, "--data", data, "--output", file, "--max-new-tokens", 8, *words).success  # noqa: B018
    return json.loads(file.read_text())


# Figures


@pytest.mark.parametrize("name", METHODS)
def test_the_figures_are_those_of_an_independent_computation(place, name):
    found = evaluate(name, "test.jsonl", "--batch-size", 4)
    both = models(name)
    metrics = found["metrics"]
    for side, model in zip(("base model", "adapter"), both, strict=True):
        loss = loss_of(model, TEST)
        assert metrics["loss (nats a token)"][side] == pytest.approx(loss, rel=1e-5)
        assert metrics["perplexity"][side] == pytest.approx(math.exp(loss), rel=1e-4)
        said = [answer_of(model, row) for row in TEST]
        assert [detail[side] for detail in found["details"]] == said
        right = sum(a == row["label"] for a, row in zip(said, TEST, strict=True))
        assert metrics["accuracy (%)"][side] == pytest.approx(100 * right / len(TEST))
    assert [(detail["text"], detail["label"]) for detail in found["details"]] == [(r["text"], r["label"]) for r in TEST]
    losses = metrics["loss (nats a token)"]
    assert abs(losses["base model"] - losses["adapter"]) > 0.02  # the two columns are not one
    assert found["data"] == "test.jsonl" and found["rows"] == 10 and found["versions"]["torch"] == torch.__version__


def test_the_memory_answers_better_than_its_base_model(place):
    metrics = evaluate("memory", "tickets.jsonl")["metrics"]
    assert metrics["accuracy (%)"]["adapter"] > metrics["accuracy (%)"]["base model"] + 20


@pytest.mark.parametrize("longest", [40, 5])
def test_an_answer_may_be_as_long_as_the_longest_label(place, monkeypatch, longest):
    """By default 32 tokens, of which this tokenizer has one a character."""
    rows = [{"text": "a", "label": "b" * length} for length in (3, longest)]
    jsonl(place / "labels.jsonl", rows)

    def says(model: object, tokenizer: object, prompts: list[str], tokens: int, *_: object, **__: object) -> list[str]:
        assert tokens == max(32, len(f" {'b' * longest}") + 1)
        return [row["label"][: tokens - 1] for row in rows]

    monkeypatch.setattr("prefixmemory.adapters.evaluate.answers", says)
    call("evaluate", "--adapter", "memory", "--data", "labels.jsonl", "--output", "found.json").success  # noqa: B018
    assert json.loads(Path("found.json").read_text())["metrics"]["accuracy (%)"]["adapter"] == 100


def test_prompts_that_lose_their_beginning_are_counted(place):
    jsonl(place / "long.jsonl", [{"text": "a" * length, "label": "b"} for length in (3, 600)])  # the model reads 512
    found = evaluate("memory", "long.jsonl")
    assert found["rows whose prompt lost its beginning"] == 1
    assert "rows whose prompt lost its beginning" not in evaluate("memory", "test.jsonl")


@pytest.mark.parametrize("data", ["questions.jsonl", "messages.jsonl"])
def test_questions_are_rendered_by_the_chat_template(place, data):
    found = evaluate("memory", data)
    for side, model in zip(("base model", "adapter"), models("memory"), strict=True):
        assert found["metrics"]["loss (nats a token)"][side] == pytest.approx(loss_of(model, QUESTIONS), rel=1e-5)
    assert set(found["metrics"]) == {"loss (nats a token)", "perplexity"} and found["details"] == []


@pytest.mark.parametrize("batch_size", [1, 3])
def test_figures_do_not_depend_on_the_batch_size(place, batch_size):
    one, other = evaluate("memory", "test.jsonl", "--batch-size", batch_size), evaluate("memory", "test.jsonl")
    assert one["details"] == other["details"]
    for name, sides in one["metrics"].items():
        assert sides == pytest.approx(other["metrics"][name], rel=1e-5)


def test_the_table_shows_what_the_file_holds(place):
    words = ("evaluate", "--adapter", "memory", "--data", "test.jsonl", "--limit", 4)
    lines = call(*words, "--output", "figures.json").success.splitlines()
    assert lines[0] == "data test.jsonl, rows 4" and lines[1].split() == ["base", "model", "adapter"]
    metrics = json.loads(Path("figures.json").read_text())["metrics"]
    assert len(lines) == 2 + len(metrics)
    for line, (name, sides) in zip(lines[2:], metrics.items(), strict=True):
        assert line.startswith(f"{name} ") and line.split()[-2:] == [
            f"{sides[s]:.4g}" for s in ("base model", "adapter")
        ]


def test_a_limit_draws_the_same_rows_each_time(place):
    drawn = [[detail["text"] for detail in evaluate("memory", "test.jsonl", "--limit", 4)["details"]] for _ in range(2)]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 4


# Rows as in training


def test_columns_of_the_training_data_are_known_again(place):
    theirs = [{"question": row["text"], "topic": row["label"]} for row in TICKETS]
    jsonl(place / "theirs.jsonl", theirs)
    columns = "data.columns={text: question, label: topic}"
    call("train", "--model", "base", "--data", "theirs.jsonl", "--output", "mapped", "--set", columns).success  # noqa: B018
    found, ours = evaluate("mapped", "theirs.jsonl"), evaluate("mapped", "tickets.jsonl")  # our names work as well
    close_figures(found["metrics"], ours["metrics"])
    close_figures(found["details"], ours["details"])
    theirs[5]["topic"] = ""
    jsonl(place / "theirs.jsonl", theirs)
    refusal = call("evaluate", "--adapter", "mapped", "--data", "theirs.jsonl").refusal
    assert "theirs.jsonl, line 6: 'label' is ''" in refusal  # not: has no column 'text'


def test_a_bad_row_does_not_have_other_columns_read(place):
    """Files of the Hub often have a number under our name beside the text of the label."""
    record = {"data": {"train": "x", "columns": {"label": "label_text"}}}
    rows = [{"text": f"line {i}", "label": i, "label_text": f"topic {i}"} for i in range(3)]
    jsonl(Path("numbered.jsonl"), rows)
    assert [row["label"] for row in rows_to_score(record, "numbered.jsonl", "test")] == [
        "topic 0",
        "topic 1",
        "topic 2",
    ]
    jsonl(Path("numbered.jsonl"), [*rows[:2], {**rows[2], "label_text": ""}])
    with pytest.raises(PrefixMemoryError, match=r"numbered\.jsonl, line 3: 'label' is ''"):
        rows_to_score(record, "numbered.jsonl", "test")


# An adapter that does nothing


def untrained(folder: Path, config: PrefixMemoryConfig | LoraConfig) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), config)
    model.peft_config["default"].base_model_name_or_path = "base"
    model.save_pretrained(folder)


def change_scale(folder: Path, scale: float) -> None:
    shutil.copytree("memory", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "scale": scale}))


NOTHING: dict[str, Callable[[Path], None]] = {
    "a memory of zeros": lambda folder: untrained(folder, PrefixMemoryConfig(task_type="CAUSAL_LM", rank=None)),
    "the default memory, B zero": lambda folder: untrained(folder, PrefixMemoryConfig(task_type="CAUSAL_LM")),
    "lora, B zero": lambda folder: untrained(folder, LoraConfig(task_type="CAUSAL_LM")),
    "a scale of 0": lambda folder: change_scale(folder, 0.0),
}


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize("words", [("--data", "test.jsonl", "--save"), ("--tasks", "tickets")], ids=["rows", "harness"])
def test_an_adapter_that_changes_nothing_is_refused(place, name, words):
    NOTHING[name](place / "nothing")
    before = files_of(place)
    message = call("evaluate", "--adapter", "nothing", *words, "--output", "figures.json").refusal
    assert "The adapter nothing changes nothing: its logits equal the base model's, bit for bit" in message
    assert files_of(place) == before


def test_an_activated_lora_that_waits_is_not_nothing(place):
    """The sentence that is read to see what an adapter changes begins with its invocation."""
    words = ("--set", "method.target_modules=all-linear", "--set", "method.alora_invocation_tokens=question")
    common = ("--data", "tickets.jsonl", "--output", "activated", "--learning-rate", 0.03, "--epochs", 2)
    call("train", "--model", "base", "--dtype", "float32", "--method", "lora", *common, *words).success  # noqa: B018
    losses = evaluate("activated", "test.jsonl")["metrics"]["loss (nats a token)"]
    assert losses["base model"] != losses["adapter"]


def test_a_small_scale_is_not_nothing(place):
    # The control of the refusals above.
    change_scale(place / "little", 0.1)
    losses = evaluate("little", "test.jsonl")["metrics"]["loss (nats a token)"]
    assert losses["base model"] != losses["adapter"]
    adapted = models("memory")[1]
    set_scale(adapted, 0.1)
    assert losses["adapter"] == pytest.approx(loss_of(adapted, TEST), rel=1e-5)


def waits_for(name: str, kind: str | None) -> None:
    """The memory as ``waiting``, from the tokens on that such prompts have."""
    shutil.copytree("memory", "waiting")
    file = Path("waiting") / "adapter_config.json"
    fields = {"active_from": name, "invocation_tokens": invocation_tokens(name, TOKENIZER, kind)}
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_an_adapter_that_would_be_silent_on_all_rows_is_refused(place):
    """It waits for the question of rows with text and label; conversations have another."""
    waits_for("question", "text")
    before = files_of(place)
    for data in ("questions.jsonl", "messages.jsonl"):
        message = call("evaluate", "waiting", "--data", data, "--save", "--output", "figures.json").refusal
        assert "No row has the tokens" in message and "its scores would be the base model's" in message
    assert files_of(place) == before
    figures = evaluate("waiting", "test.jsonl")  # the control
    assert (
        figures["metrics"]["loss (nats a token)"]["base model"] != figures["metrics"]["loss (nats a token)"]["adapter"]
    )
    assert not [name for name in figures if "invocation" in name]


@pytest.mark.filterwarnings("ignore:The invocation tokens")
def test_a_task_of_the_harness_on_which_it_is_silent_is_refused(place, task):
    waits_for("answer", None)
    words = ("evaluate", "waiting", "--tasks", "tickets", "--include-path", "my-tasks", "--output", "figures.json")
    answer = call(*words)
    assert answer.code == 1 and not Path("figures.json").exists()
    said = answer.err.splitlines()[-1]
    assert said.startswith("error: The prompts of tickets lack the tokens") and "active_from='start'" in said


# What is written


def test_save_adds_the_figures_to_record_and_card(place):
    figures, before = evaluate("memory", "test.jsonl"), json.loads(Path("memory/run.json").read_text())
    weights = Path("memory/adapter_model.safetensors").read_bytes()
    words = ("evaluate", "--adapter", "memory", "--max-new-tokens", 8, "--save")
    call(*words, "--data", "test.jsonl").success  # noqa: B018
    call(*words, "--data", "questions.jsonl").success  # noqa: B018
    after = json.loads(Path("memory/run.json").read_text())
    saved = after.pop("metrics")
    assert after == before
    for name, sides in figures["metrics"].items():
        (entry,) = (saved[key] for key in saved if key.startswith(f"{name}, data: test.jsonl, rows: 10, checksum: "))
        assert entry == pytest.approx({"value": sides["adapter"], "base model": sides["base model"]})
    assert len(saved) == 3 + 2  # both data sets
    card = Path("memory/README.md").read_text()
    assert is_ours(card)
    for name, entry in saved.items():
        assert f"| {name} | {entry['value']:.4g} | base model: {entry['base model']:.4g} |" in card
    assert Path("memory/adapter_model.safetensors").read_bytes() == weights
    call("generate", "--adapter", "memory", "--prompt", "x", "--max-new-tokens", 1).success  # noqa: B018


def test_files_of_one_name_do_not_replace_each_other(place):
    rows = Path("test.jsonl").read_text().splitlines(keepends=True)
    for day, part in (("monday", rows[:4]), ("tuesday", rows[4:8])):
        (place / day).mkdir()
        (place / day / "test.jsonl").write_text("".join(part))
        for _ in range(2):  # the same again is the same
            call("evaluate", "--adapter", "memory", "--data", f"{day}/test.jsonl", "--save").success  # noqa: B018
    saved = [name for name in json.loads(Path("memory/run.json").read_text())["metrics"] if name.startswith("loss")]
    assert len(saved) == 2 and all(", data: test.jsonl, rows: 4, checksum: " in name for name in saved)


def test_without_save_the_adapter_stays_as_it_is(place):
    before = files_of(place / "memory")
    call("evaluate", "--adapter", "memory", "--data", "test.jsonl").success  # noqa: B018
    assert files_of(place / "memory") == before


def test_a_card_that_was_edited_is_left_alone(place):
    (place / "memory" / "README.md").write_text("My own words.")
    call("evaluate", "--adapter", "memory", "--data", "test.jsonl", "--save").success  # noqa: B018
    assert (place / "memory" / "README.md").read_text() == "My own words."
    assert "metrics" in json.loads((place / "memory" / "run.json").read_text())


def test_figures_of_two_evaluations_stand_side_by_side_and_a_new_run_gets_none(place):
    """Both were loaded before either saved."""
    first, second = load_adapter("memory"), load_adapter("memory")
    for adapter, data in ((first, "a.jsonl"), (second, "b.jsonl")):
        save_metrics(adapter, Scores({"data": data}, {"loss": (2.0, 1.0)}, []))
    saved = json.loads(Path("memory/run.json").read_text())["metrics"]
    assert list(saved) == ["loss, data: a.jsonl", "loss, data: b.jsonl"]
    record = json.loads(Path("memory/run.json").read_text()) | {"train_seconds": 1e6, "metrics": {}}
    Path("memory/run.json").write_text(json.dumps(record))
    before = files_of(place)
    with pytest.raises(PrefixMemoryError, match="holds another run"):
        save_metrics(first, Scores({"data": "a.jsonl"}, {"loss": (2.0, 1.0)}, []))
    assert files_of(place) == before


def test_output_never_overwrites(place):
    (place / "figures.json").write_text("mine")
    words = ("evaluate", "--adapter", "memory", "--data", "test.jsonl", "--output", "figures.json")
    assert "figures.json exists already" in call(*words).refusal
    assert (place / "figures.json").read_text() == "mine"


def test_an_output_that_cannot_be_made_is_refused_before_anything_is_measured(place, monkeypatch):
    monkeypatch.setattr("prefixmemory.adapters.loading.load_adapter", lambda *_: pytest.fail("it was loaded"))
    for command in (("evaluate", "memory", "--data", "test.jsonl"), ("inspect", "memory")):
        said = call(*command, "--output", "test.jsonl/deeper/figures").refusal
        assert "test.jsonl is a file, so that test.jsonl/deeper/figures cannot be made" in said


def test_the_weights_of_every_adapter_are_looked_at_before_the_first_is_measured(place, monkeypatch):
    shutil.copytree("memory", "cut")
    weights = Path("cut/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-10])
    monkeypatch.setattr("prefixmemory.adapters.loading.load_adapter", lambda *_: pytest.fail("it was loaded"))
    assert "truncated or damaged" in call("inspect", "memory", "cut", "--output", "looked-at").refusal


# Refusals


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        ((), "Give either --data FILE, or --tasks"),
        (("--data", "test.jsonl", "--tasks", "tickets"), "Give either --data FILE, or --tasks"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl does not exist"),
        (("--data", "pairs.jsonl"), "pairs.jsonl, line 1: has ['prompt', 'chosen', 'rejected'], which name no one"),
        (("--data", "test.jsonl", "--include-path", "."), "--include-path is where --tasks are looked for"),
        (("--data", "test.jsonl", "--limit", 0), "limit=0"),
        (("--data", "test.jsonl", "--batch-size", 0), "batch_size=0"),
        (("--data", "test.jsonl", "--max-new-tokens", 0), "max_new_tokens=0"),
        (("--tasks", "tickets", "--include-path", "nowhere"), "include_path=nowhere is no folder"),
    ],
)
def test_bad_input_is_one_line(place, words, phrase):
    jsonl(place / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    assert phrase in call("evaluate", "--adapter", "memory", *words).refusal


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_an_adapter_that_writes_no_text_is_one_line(place, task):
    file = Path("memory/adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": task}))
    for command in (("evaluate", "memory", "--data", "test.jsonl"), ("generate", "memory", "--prompt", "x")):
        assert f"memory was trained for {task}, and writes no text" in call(*command).refusal


def test_a_damaged_record_is_one_line(place):
    (place / "memory" / "run.json").write_text('{"data": {"tr')
    assert "run.json is truncated or damaged" in call("evaluate", "--adapter", "memory", "--data", "test.jsonl").refusal
    assert "run.json is truncated or damaged" in call("generate", "--adapter", "memory", "--prompt", "x").refusal


def test_figures_of_an_adapter_on_the_hub_are_not_saved_into_its_cache(place, monkeypatch):
    monkeypatch.setattr("prefixmemory.adapters.hub.adapter_folder", lambda name: place / "memory")
    before = files_of(place)
    words = ("evaluate", "--adapter", "user/memory", "--data", "test.jsonl", "--save")
    assert "this one is on the Hub" in call(*words).refusal
    assert files_of(place) == before


# lm-evaluation-harness


TASK = r"""
task: tickets
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Text: {{{{text}}}}\nLabel:"
doc_to_target: label
doc_to_choice: [a, b, c, i, r, s]
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""


@pytest.fixture
def task(place: Path) -> Path:
    pytest.importorskip("lm_eval")
    (place / "my-tasks").mkdir()
    file = place / "my-tasks" / "tickets.yaml"
    file.write_text(TASK.format(file="test.jsonl"))
    return file


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of lm-evaluation-harness's imports


def test_a_task_of_ones_own_is_scored_without_a_network(place, task):
    words = ("evaluate", "--adapter", "memory", "--tasks", "tickets", "--include-path", "my-tasks")
    table = call(*words, "--output", "figures.json", "--save").success
    found = json.loads((place / "figures.json").read_text())
    expected = []
    for model in models("memory"):
        prompts = [f"Text: {row['text']}\nLabel:" for row in TEST]
        likeliest = [max("abcirs", key=lambda label, p=p: log_likelihood(model, p, f" {label}")) for p in prompts]
        expected.append(sum(a == row["label"] for a, row in zip(likeliest, TEST, strict=True)) / len(TEST))
    assert found["metrics"] == {"tickets: acc": {"base model": expected[0], "adapter": expected[1]}}
    assert expected[0] != expected[1]  # the two columns are not one
    assert f"{expected[0]:.4g}" in table and f"{expected[1]:.4g}" in table
    saved = json.loads((place / "memory" / "run.json").read_text())["metrics"]
    assert saved["tickets: acc, tasks: tickets, limit: none"] == {"value": expected[1], "base model": expected[0]}


def test_a_task_without_its_data_is_one_line(place, task):
    task.write_text(TASK.format(file="nowhere.jsonl"))
    words = ("evaluate", "--adapter", "memory", "--tasks", "tickets", "--include-path", "my-tasks")
    answer = call(*words)
    assert answer.code == 1 and answer.out == ""
    message = answer.err.splitlines()[-1]  # the harness has its own lines before
    assert message.startswith("error: The data of tickets cannot be loaded: Unable to find") and "data_files" in message
