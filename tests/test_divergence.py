"""A run that diverges says so, early, and leaves no adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig
from transformers import TrainerCallback

import tiny
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError
from prefixmemory.training.job import TrainingJob
from prefixmemory.training.loop import train
from prefixmemory.training.output import Output
from prefixmemory.training.run import run_training
from prefixmemory.training.settings import TrainingSettings

ROWS = [{"text": f"line {i}", "label": "abc"[i % 3]} for i in range(40)]
CONFIGS: dict[str, Callable[[], PeftConfig]] = {  # PEFT writes into a config
    "memory": lambda: PrefixMemoryConfig(task_type="CAUSAL_LM"),
    "lora": lambda: LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2),
}


class Break(TrainerCallback):
    """Puts a NaN into a trained tensor at one step; counts the steps."""

    def __init__(self, at: int) -> None:
        self.at, self.steps = at, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = state.global_step
        if state.global_step == self.at:
            with torch.no_grad():
                next(p for p in kwargs["model"].parameters() if p.requires_grad).view(-1)[0] = torch.nan


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("at", [12, 40])
def test_a_run_that_diverges_is_refused_and_saves_nothing(tmp_path, monkeypatch, config, at):
    """Also in its last step, behind the last loss that is looked at."""
    breaking = Break(at)
    monkeypatch.setattr("prefixmemory.training.run.show_progress", lambda console: breaking)
    settings = TrainingSettings(epochs=2, batch_size=2)
    job = TrainingJob("base", tiny.tokenizer(), ROWS, config(), settings)
    output, model = Output(tmp_path / "out"), tiny.build()
    with pytest.raises(
        PrefixMemoryError, match=rf"diverged: after step {max(at, 20) if at < 20 else 40} of 40"
    ) as error:
        run_training(model, job, output, console=_silent())
    assert "\n" not in str(error.value) and f"learning_rate={settings.learning_rate:g}" in str(error.value)
    assert breaking.steps == (20 if at == 12 else 40)  # the next loss that is logged ends it
    assert not output.folder.exists() and not (output.partial / "adapter_model.safetensors").exists()
    assert torch.isfinite(model(input_ids=tiny.tokens()).logits).all()  # the base model is as it was


def test_the_best_checkpoint_hides_no_divergence(tmp_path, monkeypatch):
    """It is loaded in the end, and is sound."""
    monkeypatch.setattr("prefixmemory.training.run.show_progress", lambda console: Break(25))
    settings = TrainingSettings(epochs=2, batch_size=2, keep_best=True, save_steps=10)
    job = TrainingJob("base", tiny.tokenizer(), ROWS, CONFIGS["memory"](), settings, validation=ROWS[:4])
    with pytest.raises(PrefixMemoryError, match="diverged: after step 30 of 40"):
        run_training(tiny.build(), job, Output(tmp_path / "out"), console=_silent())


def _silent() -> Any:
    from rich.console import Console

    return Console(quiet=True)


def test_a_learning_rate_without_measure_diverges_by_itself(tmp_path: Path):
    job = TrainingJob("base", tiny.tokenizer(), ROWS, CONFIGS["lora"](), TrainingSettings(learning_rate=1e30))
    with pytest.raises(PrefixMemoryError, match=r"Training diverged.* Lower learning_rate=1e\+30"):
        run_training(tiny.build(), job, Output(tmp_path / "out"))


@pytest.mark.parametrize(
    "settings", [{"keep_best": True}, {"patience": 2}, {"objective": "dpo"}, {"distractors": True}]
)
def test_train_refuses_settings_that_mean_nothing_to_it(tmp_path, settings):
    from prefixmemory.rows.distractors import Distractors

    if "distractors" in settings:
        settings = {"distractors": Distractors()}
    model = tiny.with_memory(tiny.build()).train()
    with pytest.raises(PrefixMemoryError, match=r"train\(\) learns the examples as they are"):
        train(model, tiny.tokenizer(), [], TrainingSettings(**settings), tmp_path)


def test_the_best_is_kept_by_a_validation_loss_alone():
    for settings in ({"keep_best": True}, {"patience": 1}):
        with pytest.raises(PrefixMemoryError, match="give validation rows"):
            TrainingJob("base", tiny.tokenizer(), ROWS, CONFIGS["lora"](), TrainingSettings(**settings))
    TrainingJob("base", tiny.tokenizer(), ROWS, CONFIGS["lora"](), TrainingSettings(keep_best=True), ROWS[:2])
