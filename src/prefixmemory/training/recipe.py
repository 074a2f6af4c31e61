"""The training recipe: transformers' Trainer with the settings that suit a memory."""

from __future__ import annotations

import inspect
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.training.collator import LeftPaddingCollator, tokenize
from prefixmemory.training.rows import Example
from prefixmemory.training.speed import contiguous_logits_input


@dataclass(frozen=True)
class TrainingSettings:
    """What a training run can be told; the defaults suit a :class:`PrefixMemoryConfig` with its defaults.

    ``learning_rate`` is the peak of a cosine schedule with ``warmup`` (share of all steps); ``save_steps`` counts
    optimizer steps between checkpoints.
    """

    learning_rate: float = 3e-4
    epochs: int | float = 3
    batch_size: int = 8
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 1024
    save_steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs", "batch_size", "max_grad_norm", "max_length", "save_steps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise PrefixMemoryError(f"{name}={getattr(self, name)} is out of range: give a number above 0.")
        if not 0 <= self.weight_decay < float("inf"):
            raise PrefixMemoryError(f"weight_decay={self.weight_decay} is out of range: give a number from 0 on.")
        if not 0 <= self.seed < 2**32:
            raise PrefixMemoryError(f"seed={self.seed} is out of range: give a number from 0 to 2**32 - 1.")
        if not 0 <= self.warmup < 1:
            raise PrefixMemoryError(f"warmup={self.warmup} is out of range: give a share of the steps in [0, 1).")


class Interrupted(Exception):
    """Training was stopped by ctrl-C after a checkpoint was written."""


class StopOnInterrupt(TrainerCallback):
    """First ctrl-C: finish the step, write a checkpoint, stop. Second ctrl-C: stop at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> StopOnInterrupt:
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nStopping after this step; ctrl-C again stops at once.", file=sys.stderr)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop once asked to."""
        if self.asked:
            control.should_save = True
            control.should_training_stop = True


def train(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    settings: TrainingSettings,
    checkpoints: Path,
    resume: bool = False,
    callbacks: list[TrainerCallback] | None = None,
) -> dict[str, float]:
    """Train the parameters of ``model`` that require gradients on ``examples``.

    Args:
        model: a PEFT model.
        tokenizer: its tokenizer.
        examples: rendered examples; only their completions count in the loss.
        settings: see :class:`TrainingSettings`.
        checkpoints: folder for the Trainer's checkpoints.
        resume: go on from the last checkpoint there.
        callbacks: further Trainer callbacks.

    Returns:
        The Trainer's metrics: ``train_loss``, ``train_runtime`` in seconds, and others.

    Raises:
        Interrupted: ctrl-C; the last checkpoint holds everything up to the last finished step.
        PrefixMemoryError: nothing to train, nothing to resume, or an example that does not fit.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise PrefixMemoryError(
            "The model has no trainable parameters. Make it with get_peft_model(model, PrefixMemoryConfig()), or load "
            "an adapter with is_trainable=True."
        )
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if resume and last is None:
        raise PrefixMemoryError(f"{checkpoints} holds no checkpoint to resume from. Start afresh with --overwrite.")

    base: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    crop_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
    use_cache = getattr(base.config, "use_cache", None)
    on_gpu = torch.cuda.is_available()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(checkpoints),
            learning_rate=settings.learning_rate,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            lr_scheduler_type="cosine",
            warmup_steps=settings.warmup,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            seed=settings.seed,
            save_steps=settings.save_steps,
            save_total_limit=2,
            logging_steps=10,
            logging_strategy="steps",
            disable_tqdm=True,
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=on_gpu,
            use_cpu=not on_gpu,
            train_sampling_strategy="group_by_length",
        ),
        train_dataset=Dataset.from_list(tokenize(examples, tokenizer, settings.max_length)),
        data_collator=LeftPaddingCollator(int(tokenizer.pad_token_id), crop_logits),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # progress is shown by the caller's callbacks, or not at all
    try:
        with StopOnInterrupt() as stop, contiguous_logits_input(model):
            trainer.add_callback(stop)
            result = trainer.train(resume_from_checkpoint=last if resume else None)
    finally:
        base.config.use_cache = use_cache  # the Trainer switches it off and leaves it so
    if stop.asked and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted
    return dict(result.metrics)
