"""How long a run took, and how it learned, in all its parts."""

from __future__ import annotations

import time
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


class Stopwatch(TrainerCallback, ExportableState):
    """Counts on from what the checkpoint holds that a run is resumed from.

    Attributes:
        before: seconds until that checkpoint.
    """

    def __init__(self) -> None:
        self.before = 0.0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Those of the run; what a kill has lost does not count."""
        return self.before + time.monotonic() - self._started

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have a place among what is saved, which the checkpoint of an earlier version lacks."""
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())  # type: ignore[union-attr]

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"args": {}, "attributes": {"before": self.seconds}}


class LogWithSave(TrainerCallback):
    """Has the loss logged where a checkpoint is saved, and in the end, so that what is logged is of all steps; stands
    behind the callbacks that ask for checkpoints."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The Trainer logs first, then saves."""
        control.should_log |= control.should_save or state.global_step >= state.max_steps


def seconds_of(trainer: Trainer) -> float:
    """Those of its run; a resume has put another stopwatch into the place of the one that was added."""
    (watch,) = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Stopwatch)]
    return watch.seconds


def loss_of(trainer: Trainer) -> float:
    """Mean loss of all steps of its run; the Trainer's own figure forgets what was before a resume."""
    logged = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    steps = [0, *(step for step, _ in logged)]
    return sum(loss * (step - last) for last, (step, loss) in zip(steps, logged, strict=False)) / max(steps[-1], 1)
