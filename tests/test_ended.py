"""A run that is resumed behind its last step is finished, not trained on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import TrainerCallback

import tiny
from prefixmemory import PrefixMemoryConfig
from prefixmemory.rows.encoding import tokenize
from prefixmemory.rows.rendering import Example
from prefixmemory.training.interrupt import Interrupted
from prefixmemory.training.loop import completion_trainer, fit, training_arguments
from prefixmemory.training.settings import TrainingSettings
from prefixmemory.training.stopwatch import seconds_of

TOKENIZER = tiny.tokenizer()
ROWS = tokenize([Example(f"a{i}", f"b{i}<eos>") for i in range(8)], TOKENIZER, 100)
#: Patience runs out at step 6; were it trained on, step 8 would be the best.
LOSSES = {2: 1.0, 4: 0.9, 6: 1.1, 8: 0.8, 10: 0.7, 12: 0.6}
PATIENT = TrainingSettings(epochs=20, batch_size=8, learning_rate=0.3, save_steps=2, patience=1, scheduler="constant")
HALF = TrainingSettings(epochs=2.5, batch_size=2, learning_rate=0.02, scheduler="constant")


class Seen(TrainerCallback):
    """Which steps were made; says what the validation loss was, and does ``then`` at an evaluation."""

    def __init__(self, then: Any = lambda: None) -> None:
        self.steps: list[int] = []
        self.then = then

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps.append(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        metrics["eval_loss"] = LOSSES[state.global_step]
        if state.global_step == 6:
            then, self.then = self.then, lambda: None
            then()


def run(settings: TrainingSettings, folder: Path, seen: Seen, resume: bool = False) -> tuple[PeftModel, Any]:
    model = get_peft_model(tiny.build(), PrefixMemoryConfig(task_type="CAUSAL_LM", output_limit=None))
    validation = ROWS[:2] if settings.keeps_best else []
    arguments = training_arguments(settings, folder, bool(validation))
    trainer = completion_trainer(model, TOKENIZER, lambda epoch: ROWS, validation, arguments)
    fit(trainer, settings, resume, [seen])
    return model, trainer


def same(first: PeftModel, second: PeftModel) -> bool:
    ours, theirs = tiny.memory_parameters(first), tiny.memory_parameters(second)
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_that_patience_ended_stays_ended(tmp_path):
    """Killed while the adapter was being saved."""

    def fail() -> None:
        raise RuntimeError("killed")

    whole, trainer = run(PATIENT, tmp_path / "whole", Seen())
    with pytest.raises(RuntimeError, match="killed"):
        run(PATIENT, tmp_path / "killed", Seen(fail))
    # the checkpoint of step 6 is written behind its evaluation
    run(PATIENT, tmp_path / "killed", Seen(), resume=True)
    seen = Seen()
    resumed, again = run(PATIENT, tmp_path / "killed", seen, resume=True)
    assert seen.steps == [] and same(resumed, whole)
    assert again.state.best_global_step == trainer.state.best_global_step == 4
    assert again.state.global_step == 6 and seconds_of(again) > 0


def test_ctrl_c_in_the_last_evaluation_is_none_of_a_run_that_goes_on(tmp_path):
    whole, _ = run(PATIENT, tmp_path / "whole", Seen())
    asked, _ = run(PATIENT, tmp_path / "asked", Seen(lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert same(asked, whole)
    longer = TrainingSettings(**{**vars(PATIENT), "patience": 2})
    with pytest.raises(Interrupted):  # the control: there it would have gone on
        run(longer, tmp_path / "longer", Seen(lambda: os.kill(os.getpid(), signal.SIGINT)))


def test_the_last_step_may_be_in_mid_epoch(tmp_path):
    seen = Seen()
    whole, _ = run(HALF, tmp_path, seen)
    assert seen.steps == list(range(1, 11))
    seen = Seen()
    resumed, trainer = run(HALF, tmp_path, seen, resume=True)
    assert seen.steps == [] and same(resumed, whole) and trainer.state.global_step == 10
