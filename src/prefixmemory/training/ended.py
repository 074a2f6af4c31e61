"""A run that is resumed behind its last step: what is left is to keep what it learned.

transformers looks for the end of a run behind steps only, so that it would make one more, or go on until the next
evaluation where patience had run out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from prefixmemory.training.stopwatch import Stopwatch


def had_ended(checkpoint: Path, patience: int | None) -> bool:
    """Whether the run made no step behind ``checkpoint``: it was the last, or ``patience`` had run out."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    stored: Any = (state.stateful_callbacks or {}).get(EarlyStoppingCallback.__name__, {})
    waited = stored.get("attributes", {}).get("early_stopping_patience_counter", 0)
    return state.global_step >= state.max_steps or (patience is not None and waited >= patience)


def has_ended(trainer: Trainer) -> bool:
    """Whether a run ended by itself: with its last step, or as patience had run out."""
    callbacks = trainer.callback_handler.callbacks
    early = [callback for callback in callbacks if isinstance(callback, EarlyStoppingCallback)]
    ran_out = any(one.early_stopping_patience_counter >= one.early_stopping_patience for one in early)
    return ran_out or trainer.state.global_step >= trainer.state.max_steps


def take_over(trainer: Trainer, checkpoint: Path, keeps_best: bool) -> None:
    """Give ``trainer`` the state that the run ended with, and its model the last weights, or the best ones."""
    state = trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    taken = checkpoint
    if keeps_best and state.best_model_checkpoint is not None:
        taken = checkpoint.parent / Path(state.best_model_checkpoint).name  # the folder may have been moved
    model: Any = trainer.model
    model.load_adapter(str(taken), model.active_adapters[0], is_trainable=True)
    stored: Any = (state.stateful_callbacks or {}).get(Stopwatch.__name__, {})
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Stopwatch):
            callback.before = stored.get("attributes", {}).get("before", 0.0)
