"""What ``prefixmemory train`` leaves: adapters of every objective, the best one, logs; and what a kill leaves of it."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, TrainerCallback

import processes
import tiny
from command_line import WEIGHTS, call, files_of, jsonl, save_talker, weights, work_in_copy
from prefixmemory import PrefixMemoryConfig
from prefixmemory.training.job import TrainingJob
from prefixmemory.training.loop import training_arguments
from prefixmemory.training.methods import method_config
from prefixmemory.training.preferences import preference_trainer
from prefixmemory.training.settings import TrainingSettings

# TRL 1.16 switches gradient checkpointing on and off under the names that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings(r"ignore:`gradient_checkpointing(_\w+)?` is deprecated:FutureWarning")

TICKETS = [{"text": f"line {i} is dead" + " again" * (i % 5), "label": "abc"[i % 3]} for i in range(24)]
PAIRS = [
    {"prompt": f"how is {i}?", "chosen": "well" + "!" * (i % 3), "rejected": "bad" + "?" * (i % 2)} for i in range(12)
]
JUDGED = [
    {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
    for row in PAIRS
    for name in ("chosen", "rejected")
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save_talker(folder / "base")
    for name, rows in (("tickets", TICKETS), ("pairs", PAIRS), ("judged", JUDGED)):
        jsonl(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return work_in_copy(made, tmp_path, monkeypatch)


def train(*words: object, data: str = "tickets.jsonl", output: str = "adapter") -> list[str]:
    return ["train", "--model", "base", "--data", data, "--output", output, "--dtype", "float32", *map(str, words)]


def record(folder: str = "adapter") -> dict[str, Any]:
    return json.loads(Path(folder, "run.json").read_text())


def models(folder: str = "adapter") -> tuple[torch.nn.Module, PeftModel]:
    """The base model as it lies on disk, and with the adapter."""
    base = AutoModelForCausalLM.from_pretrained("base")
    return base, PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), folder).eval()


def log_likelihood(model: torch.nn.Module, prompt: str, answer: str) -> float:
    """Of the tokens of ``answer`` after ``prompt``, which are rendered already."""
    tokenizer = tiny.tokenizer()
    ids, count = tokenizer(prompt + answer)["input_ids"], len(tokenizer(answer)["input_ids"])
    with torch.no_grad():
        scores = log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
    return sum(float(scores[i - 1, ids[i]]) for i in range(len(ids) - count, len(ids)))


def asked(prompt: str) -> str:
    return f"<|user|>{prompt}<eos><|assistant|>"


# Objectives and methods

METHODS = {
    "memory": (),
    "memory with a small map": ("--feature-map", "mlp", "--normalize", "feature_l2"),
    "lora": ("--method", "lora", "--set", "method.target_modules=all-linear"),
}


@pytest.mark.parametrize("name", METHODS)
def test_training_teaches_the_labels_and_leaves_the_base_model_alone(place, name):
    before = files_of(place / "base")
    out = call(*train("--learning-rate", 0.03, "--epochs", 6, *METHODS[name])).success
    assert files_of(place / "base") == before
    assert {path.name for path in (place / "adapter").iterdir()} == {
        "adapter_config.json", WEIGHTS, "README.md", "run.json",
    }  # fmt: skip
    base, adapted = models()
    found = [
        [log_likelihood(model, f"Text: {row['text']}\nLabel:", f" {row['label']}<eos>") / 3 for row in TICKETS]
        for model in (base, adapted)
    ]
    losses = [-sum(values) / len(TICKETS) for values in found]
    assert losses[1] < losses[0] - 0.5
    left = record()
    assert losses[1] < left["train_loss"] < losses[0]  # the mean over the run
    assert left["data"] == {"train": "tickets.jsonl", "train_split": "train", "validation_split": "validation"}
    assert Path(left["base_model"]) == Path("base").resolve()  # found from any folder
    assert (left["rows"], left["row_format"], left["dtype"]) == (24, "text", "float32")
    trained = sum(tensor.numel() for name, tensor in weights(Path("adapter")).items() if not name.endswith(".mean"))
    assert left["trainable_parameters"] == trained and f"Trained {trained:,} parameters on 24 rows" in out


PREFERENCES = {
    "dpo": ("dpo", "pairs.jsonl", ()),
    "dpo, lora": ("dpo", "pairs.jsonl", ("--method", "lora", "--learning-rate", 0.02)),
    "kto": ("kto", "judged.jsonl", ()),
    "kto from pairs": ("kto", "pairs.jsonl", ()),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_are_learned_from_a_recipe(place, name):
    pytest.importorskip("trl")
    objective, data, words = PREFERENCES[name]
    (place / "mine.yaml").write_text(
        f"model: base\noutput: adapter\ndtype: float32\ndata: {{train: {data}}}\n"
        f"training: {{objective: {objective}, learning_rate: 0.02, epochs: 2, batch_size: 4, beta: 0.5}}\n"
    )
    before = files_of(place / "base")
    call("train", "mine.yaml", *words).success  # noqa: B018
    assert files_of(place / "base") == before and not list(place.glob("*.partial"))

    left = record()
    assert left["settings"]["objective"] == objective and left["row_format"] == Path(data).stem.replace(
        "pairs", "preference"
    )
    start, end = call_untrained(words[:2]), weights(Path("adapter"))
    assert start.keys() == end.keys() and end
    for key, tensor in end.items():
        assert not torch.equal(tensor, start[key]), key

    base, adapted = models()
    gains = [
        log_likelihood(adapted, asked(row["prompt"]), f"{row[name]}<eos>")
        - log_likelihood(base, asked(row["prompt"]), f"{row[name]}<eos>")
        for row in PAIRS
        for name in ("chosen", "rejected")
    ]
    assert sum(gains[::2]) / len(PAIRS) > sum(gains[1::2]) / len(PAIRS) + 0.1  # good answers gained on bad ones


def call_untrained(words: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Weights of the same adapter after a step of next to no length: its start values."""
    call(*train("--set", "training.learning_rate=1e-30", "--epochs", 0.01, *words, output="untrained")).success  # noqa: B018
    return weights(Path("untrained"))


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_long_prompts_lose_their_beginning_and_no_row_is_dropped(tmp_path, objective):
    pytest.importorskip("trl")
    rows = [{**row, "prompt": "x" * (3 * i) + f"end {i}?"} for i, row in enumerate(PAIRS)]
    settings = TrainingSettings(objective=objective, max_length=24, batch_size=4)
    config = PrefixMemoryConfig(task_type="CAUSAL_LM")
    job = TrainingJob("base", tiny.tokenizer(), rows, config, settings, rows[-2:])
    trainer = preference_trainer(tiny.build(), job, training_arguments(settings, tmp_path, evaluates=True))
    tokenizer = tiny.tokenizer()
    names = ("chosen_ids", "rejected_ids") if objective == "dpo" else ("completion_ids",)
    for dataset, expected in ((trainer.train_dataset, rows), (trainer.eval_dataset, rows[-2:])):
        assert len(dataset) == len(expected) * (1 if objective == "dpo" else 2)
        found = [tokenizer.decode(row[name]) for row in dataset for name in names]
        assert sorted(found) == sorted(f"{row[name]}<eos>" for row in expected for name in ("chosen", "rejected"))
        for row in dataset:
            assert len(row["prompt_ids"]) + max(len(row[name]) for name in names) <= 24
            prompt = tokenizer.decode(row["prompt_ids"])
            assert any(asked(other["prompt"]).endswith(prompt) for other in expected) and len(prompt) > 12
    assert any(len(row["prompt_ids"]) + max(len(row[name]) for name in names) < 24 for row in trainer.train_dataset)


def test_a_run_of_one_step_trains(place):
    # Its only step would be one of the warmup, which begins at a learning rate of 0.
    call(*train("--epochs", 1, "--batch-size", 24)).success  # noqa: B018
    assert all(tensor.abs().max() > 0 for tensor in weights(Path("adapter")).values())


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (("--set", "method.target_modules=[q_prj]"), "Target modules {'q_prj'} not found"),
        (("--set", "method.r=0"), "should be a positive integer"),
    ],
)
def test_a_method_that_does_not_suit_the_model_is_one_line(place, words, phrase):
    before = files_of(place)
    assert phrase in call(*train("--method", "lora", "--learning-rate", 1e-3, *words)).refusal
    assert files_of(place) == before


def test_trl_that_refuses_is_one_line(place):
    pytest.importorskip("trl")
    words = train(
        "--objective", "dpo", "--method", "lora", "--learning-rate", 1e-3, "--set", "method.r=0", data="pairs.jsonl"
    )
    assert "objective='dpo': TRL refuses this run: `r` should be" in call(*words).refusal


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "p_tuning"])
def test_methods_that_need_a_length_say_so(method):
    with pytest.raises(ValueError, match=rf"method\.num_virtual_tokens is missing: {method} needs it"):
        method_config({"name": method})


# Packages that are not there


@pytest.mark.parametrize(
    ("words", "module", "phrase"),
    [
        (
            ("--report-to", "wandb"),
            "prefixmemory.training.loop",
            "report_to='wandb' needs the package: pip install wandb",
        ),
        (("--quantization", "bnb-4bit"), "prefixmemory.models.quantization", "pip install 'prefixmemory[quantized]'"),
        (("--objective", "dpo", "--data", "pairs.jsonl"), "prefixmemory.training.preferences", "'prefixmemory[trl]'"),
    ],
)
def test_a_package_that_is_not_installed_is_named_before_the_model_is_loaded(place, monkeypatch, words, module, phrase):
    monkeypatch.setattr(f"{module}.find_spec", lambda name: None)
    monkeypatch.setattr("prefixmemory.training.run.load_model", lambda *args: pytest.fail("the model was loaded"))
    assert phrase in call(*train(*words)).refusal
    assert not list(place.glob("adapter*"))


# TensorBoard


def logged(folder: Path) -> dict[str, list[int]]:
    """Scalars by name: the steps that they were written for."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {name: [event.step for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_tensorboard_files_lie_in_the_output_folder(place):
    pytest.importorskip("tensorboard")
    words = train("--report-to", "tensorboard", "--epochs", 4, "--save-steps", 5, "--validation", "tickets.jsonl")
    call(*words).success  # noqa: B018
    assert not list(place.glob("adapter.partial")) and not list(place.glob("adapter/checkpoints"))
    files = list(place.rglob("events.out.tfevents*"))
    assert files and all(file.parent == place / "adapter" / "runs" for file in files)
    found = logged(place / "adapter" / "runs")
    assert found["train/loss"] == [5, 10, 12]  # every ten steps, with every checkpoint, and in the end
    assert set(found["eval/loss"]) >= {5, 10, 12}
    # an adapter folder all the same
    assert "with memory" in call("generate", "--adapter", "adapter", "--prompt", "x", "--max-new-tokens", 1).success
    call(*words, "--overwrite").success  # noqa: B018


# The best adapter


class Watch(TrainerCallback):
    """Keeps the weights of every checkpoint and every validation loss; ``stop_at`` dies after that step."""

    def __init__(self, folder: Path, stop_at: int | None = None) -> None:
        self.folder, self.stop_at = folder, stop_at
        self.losses: dict[int, float] = {}

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.losses.setdefault(state.global_step, metrics["eval_loss"])

    def on_save(self, args, state, control, **kwargs):
        self.folder.mkdir(exist_ok=True)
        shutil.copy(
            Path(args.output_dir, f"checkpoint-{state.global_step}", WEIGHTS), self.folder / f"{state.global_step}"
        )

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.stop_at:
            raise RuntimeError("stopped")


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Watch]:
    """A watch over the next run of the command line, in place of its progress bar."""

    def make(**how: Any) -> Watch:
        watch = Watch(tmp_path / "kept", **how)
        monkeypatch.setattr("prefixmemory.training.run.show_progress", lambda console: watch)
        return watch

    return make


#: The loss of labels that the training rows do not have falls with what all labels share, then rises.
OVERFITTING = (
    "--learning-rate", 0.03, "--epochs", 12, "--batch-size", 8, "--save-steps", 3, "--set", "training.warmup=0",
    "--validation", "held.jsonl", "--set", "method.output_limit=null", "--normalize", "none",
    "--set", "method.feed_forward=null", "--set", "method.active_from=start",
)  # fmt: skip


@pytest.fixture
def overfitted(place: Path) -> Path:
    jsonl(place / "held.jsonl", [{"text": f"other {i}", "label": "xyz"[i % 3]} for i in range(6)])
    return place


def best_step(losses: dict[int, float]) -> int:
    return min(losses, key=lambda step: losses[step])


def same(folder: Path, file: Path) -> bool:
    return (folder / WEIGHTS).read_bytes() == file.read_bytes()


def test_the_best_adapter_is_kept_where_that_is_asked_for(overfitted, watch):
    last, best = watch(), "training.keep_best=true"
    words = train(*OVERFITTING)
    call(*words).success  # noqa: B018
    steps = sorted(last.losses)
    assert steps[-1] == 36 and steps[0] < best_step(last.losses) < steps[-1]  # else the last could be the best
    assert same(overfitted / "adapter", overfitted / "kept" / "36")
    assert record()["validation_loss"] == pytest.approx(last.losses[36], abs=1e-6)

    kept = watch()
    call(*words, "--set", best, "--output", "best").success  # noqa: B018
    assert kept.losses == pytest.approx(last.losses, abs=1e-6)
    assert same(overfitted / "best", overfitted / "kept" / f"{best_step(kept.losses)}")
    assert record("best")["validation_loss"] == pytest.approx(min(kept.losses.values()), abs=1e-6)


def test_patience_stops_and_keeps_the_best_also_after_a_resume(overfitted, watch, monkeypatch):
    words = train(*OVERFITTING, "--set", "training.patience=3")
    whole = watch()
    call(*words).success  # noqa: B018
    steps = sorted(whole.losses)
    best = best_step(whole.losses)
    assert steps.index(best) == len(steps) - 4 and steps[-1] < 36  # three evaluations without a lower loss
    assert same(overfitted / "adapter", overfitted / "kept" / f"{best}")

    # Killed after the first evaluation without a lower loss, and resumed.
    resumed = train(*words[words.index("--learning-rate") :], output="resumed")
    watch(stop_at=best + 4)
    with pytest.raises(RuntimeError, match="stopped"):
        call(*resumed)
    shutil.copytree(overfitted / "resumed.partial", overfitted / "again.partial")
    rest = watch()
    call(*resumed, "--resume").success  # noqa: B018
    assert rest.losses == {step: loss for step, loss in whole.losses.items() if step > best + 3}
    assert same(overfitted / "resumed", overfitted / "adapter" / WEIGHTS)
    assert record("resumed")["validation_loss"] == pytest.approx(whole.losses[best], abs=1e-6)

    # The control: where transformers begins to count anew, the run stops later.
    forgetful = {"restore_callback_states_from_checkpoint": False}
    monkeypatch.setattr(
        "prefixmemory.training.run.training_arguments", lambda *args: {**training_arguments(*args), **forgetful}
    )
    longer = watch()
    call(*resumed, "--resume", "--output", "again").success  # noqa: B018
    assert max(longer.losses) > steps[-1]


# Killed

LONG = ("--learning-rate", 0.02, "--epochs", 12, "--batch-size", 4, "--save-steps", 4)  # 72 steps


@pytest.fixture(scope="module")
def uninterrupted(made: Path) -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        call(*train(*LONG, output="whole")).success  # noqa: B018
    return weights(made / "whole")


def run_in_process(words: list[str]) -> None:
    torch.set_num_threads(1)
    call(*words)


@pytest.mark.parametrize("when", ["as a checkpoint begins", "at some moment"])
def test_a_killed_run_goes_on_to_the_same_adapter(place, uninterrupted, when):
    draw = random.Random(when)
    process = processes.start(run_in_process, train(*LONG))
    partial, step = place / "adapter.partial", draw.randrange(8, 60, 4)
    end = time.monotonic() + 120
    while not (partial / "checkpoints" / f"checkpoint-{step}").is_dir():
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.001)
    if when == "at some moment":
        time.sleep(draw.random() * 0.1)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert partial.is_dir() and not (place / "adapter").exists()

    call(*train(*LONG, "--resume")).success  # noqa: B018
    assert not partial.exists()
    resumed = weights(place / "adapter")
    assert resumed.keys() == uninterrupted.keys() and resumed
    for name, tensor in resumed.items():
        assert tensor.abs().max() > 1e-3
        torch.testing.assert_close(tensor, uninterrupted[name], rtol=0, atol=1e-6)


# Text in front of the rows


def test_a_stopped_run_goes_on_behind_the_same_passages_and_refuses_others(place, watch):
    front = place / "front.txt"
    front.write_text("nothing of this is asked about\n" * 20)
    places = ("--set", "training.distractors.tokens=40", "--set", f"training.distractors.file={front}")
    words = train("--learning-rate", 0.02, "--epochs", 4, "--batch-size", 4, "--save-steps", 4, *places)
    call(*words, "--output", "behind").success  # noqa: B018
    call(*train(*words[words.index("--learning-rate") : -4]), "--output", "plain").success  # noqa: B018
    watch(stop_at=12)
    with pytest.raises(RuntimeError, match="stopped"):
        call(*words)
    written = front.read_text()
    front.write_text("another text, which is as long\n" * 20)
    assert "distractors_sha256" in call(*words, "--resume").err
    front.write_text(written)
    watch()
    call(*words, "--resume").success  # noqa: B018
    resumed, whole, plain = (weights(place / name) for name in ("adapter", "behind", "plain"))
    for name, tensor in resumed.items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-6)
    assert any((tensor - plain[name]).abs().max() > 1e-3 for name, tensor in resumed.items())
    assert record()["settings"]["distractors"] == {"share": 0.5, "tokens": 40, "file": str(front)}
