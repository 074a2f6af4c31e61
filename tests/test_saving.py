"""Checkpoints by the clock, and how the learning rate falls."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback

import tiny
from close import close_training
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError
from prefixmemory.rows.rendering import Example
from prefixmemory.training import saving
from prefixmemory.training.loop import train
from prefixmemory.training.settings import TrainingSettings

EXAMPLES = [Example(f"Text: {i}\nLabel:", f" {'ab'[i % 2]}<eos>") for i in range(24)]
#: Seconds that a step takes by the clock of these tests; six steps are five minutes.
STEP = 50


class Clock(TrainerCallback):
    """A clock that goes on by the step; ``die_at``: the step after which training dies."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, die_at: int | None = None) -> None:
        self.now, self.die_at, self.rates = 0.0, die_at, []
        monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: self.now))

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.die_at:
            raise MemoryError
        self.now += STEP

    def on_step_end(self, args, state, control, lr_scheduler, **kwargs):
        self.rates.append(lr_scheduler.get_last_lr()[0])


def trained(folder: Path, clock: Clock, resume: bool = False, **settings: object) -> PeftModel:
    model = get_peft_model(tiny.build(), PrefixMemoryConfig(task_type="CAUSAL_LM"))
    given = TrainingSettings(**{"batch_size": 4, "epochs": 1, "learning_rate": 0.01, **settings})
    train(model, tiny.tokenizer(), EXAMPLES, given, folder, resume, [clock])
    return model


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [3, 6]),  # 150 s are more than two minutes; the last step always has one
        ({"save_minutes": 2.6}, [4, 6]),
        ({"save_minutes": None}, [6]),
        ({"save_minutes": 2, "save_steps": 2}, [4, 6]),  # those by step start the clock again; two are kept
    ],
)
def test_checkpoints_are_written_by_the_clock_beside_those_by_the_step(tmp_path, monkeypatch, settings, expected):
    trained(tmp_path, Clock(monkeypatch), **settings)
    assert checkpoints(tmp_path) == [f"checkpoint-{step}" for step in expected]


def test_a_short_run_that_dies_goes_on_from_there_to_the_same_memory(tmp_path, monkeypatch):
    whole = trained(tmp_path / "whole", Clock(monkeypatch))
    with pytest.raises(MemoryError):
        trained(tmp_path / "died", Clock(monkeypatch, die_at=5))
    assert checkpoints(tmp_path / "died") == ["checkpoint-3"]
    resumed = trained(tmp_path / "died", Clock(monkeypatch), resume=True)
    close_training(tiny.memory_parameters(resumed), tiny.memory_parameters(whole))


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_minutes_are_a_number_above_0(value):
    with pytest.raises(PrefixMemoryError, match=f"save_minutes={value} is out of range: give a number above 0"):
        TrainingSettings(save_minutes=value)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("cosine", [0.005, 0.01, 0.0085, 0.005, 0.0015, 0]),
        ("linear", [0.005, 0.01, 0.0075, 0.005, 0.0025, 0]),
        ("constant", [0.005, 0.01, 0.01, 0.01, 0.01, 0.01]),
    ],
)
def test_the_learning_rate_rises_and_falls_as_it_was_asked_to(tmp_path, monkeypatch, scheduler, expected):
    clock = Clock(monkeypatch)
    trained(tmp_path, clock, scheduler=scheduler, warmup=0.3)
    assert clock.rates == pytest.approx(expected, abs=1e-4)


@pytest.mark.usefixtures("untyped")
def test_a_schedule_that_is_not_known_is_refused():
    with pytest.raises(PrefixMemoryError, match=r"scheduler='cosin' is not known. Did you mean 'cosine'"):
        TrainingSettings(scheduler="cosin")


# What is saved beside what is trained


def test_under_zero3_what_does_not_learn_is_a_buffer_which_trainers_save(monkeypatch, tmp_path):
    # DeepSpeed's own files leave out parameters that require no gradient, and keep buffers.
    monkeypatch.setattr("prefixmemory.tuner.layer.is_deepspeed_zero3_enabled", lambda: True)
    model = get_peft_model(tiny.build(), PrefixMemoryConfig(task_type="CAUSAL_LM"))
    ids = tiny.tokens()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
    model.save_pretrained(tmp_path, state_dict=kept)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    means = {name for name in saved if name.endswith(".mean")}
    assert len(means) == 2 and all(saved[name].any() for name in means)
    monkeypatch.undo()
    again = PeftModel.from_pretrained(tiny.build(), str(tmp_path))
    assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_an_adapter_is_not_saved_without_what_does_not_learn(tmp_path):
    model = get_peft_model(tiny.build(), PrefixMemoryConfig(task_type="CAUSAL_LM"))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with pytest.raises(PrefixMemoryError, match=r"prefix_memory_bank\.mean is not among the tensors"):
        model.save_pretrained(tmp_path, state_dict=trained)
    assert not list(tmp_path.glob("adapter_*"))
