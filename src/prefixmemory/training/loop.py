"""The training loop: transformers' Trainer with the settings that suit a memory, interruptible and resumable."""

from __future__ import annotations

import inspect
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.integration_utils import TensorBoardCallback

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.models.logits import contiguous_logits_input
from prefixmemory.rows.collator import LeftPaddingCollator, tokenize
from prefixmemory.rows.rows import Example
from prefixmemory.training.checkpoints import last_complete_checkpoint
from prefixmemory.training.sampler import LengthGroupedTrainer
from prefixmemory.training.settings import TrainingSettings

#: transformers 5.23 renamed the argument.
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in inspect.signature(TrainingArguments).parameters
    else "gradient_checkpointing"
)


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
        """Stop once asked to, all processes at the same step: the checkpoint is written together."""
        if args.world_size > 1:
            asked = torch.tensor(int(self.asked), device=args.device)
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
            self.asked = bool(asked)
        if self.asked:
            control.should_save = True
            control.should_training_stop = True


def training_arguments(
    settings: TrainingSettings, checkpoints: Path, evaluates: bool, report_to: Sequence[str] = ()
) -> dict[str, Any]:
    """Arguments that ``TrainingArguments`` and its children in TRL share.

    Raises:
        PrefixMemoryError: a tracker in ``report_to`` is not installed.
    """
    check_trackers(report_to)
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(checkpoints),
        "learning_rate": settings.learning_rate,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "lr_scheduler_type": "cosine",
        "warmup_steps": settings.warmup,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "bf16": settings.mixed_precision == "bf16",
        "fp16": settings.mixed_precision == "fp16",
        CHECKPOINTING: settings.gradient_checkpointing,
        f"{CHECKPOINTING}_kwargs": {"use_reentrant": False} if settings.gradient_checkpointing else None,
        "seed": settings.seed,
        "save_steps": settings.save_steps,
        "save_total_limit": 2,
        "restore_callback_states_from_checkpoint": True,  # else early stopping forgets its patience
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": settings.save_steps if evaluates else None,
        "load_best_model_at_end": evaluates and settings.keeps_best,
        "metric_for_best_model": "eval_loss" if evaluates and settings.keeps_best else None,
        "greater_is_better": False if evaluates and settings.keeps_best else None,
        "logging_steps": 10,
        "logging_strategy": "steps",
        "disable_tqdm": True,
        "report_to": list(report_to) or "none",
        "dataloader_pin_memory": on_gpu,
        "use_cpu": not on_gpu,
    }


def check_trackers(report_to: Sequence[str]) -> None:
    """Refuse trackers that are not installed."""
    for tracker in report_to:
        if find_spec(tracker) is None:
            raise PrefixMemoryError(f"report_to={tracker!r} needs the package: pip install {tracker}.")


def completion_trainer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    features: list[dict[str, list[int]]],
    validation: list[dict[str, list[int]]],
    arguments: dict[str, Any],
) -> Trainer:
    """A Trainer for the likelihood of completions (``objective="sft"``), on what :func:`tokenize` returns."""
    return LengthGroupedTrainer(
        model=model,
        args=TrainingArguments(**arguments, remove_unused_columns=False),
        train_dataset=Dataset.from_list(features),
        eval_dataset=Dataset.from_list(validation) if validation else None,
        data_collator=collator(model, tokenizer),
    )


def collator(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> LeftPaddingCollator:
    """The collator that suits ``model``."""
    # Methods that prepend virtual tokens prepend labels too, count on logits for all of them, and ignore position ids.
    prepends = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    base: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    crop_logits = not prepends and "logits_to_keep" in inspect.signature(base.forward).parameters
    return LeftPaddingCollator(int(tokenizer.pad_token_id), crop_logits, right=prepends)


@contextmanager
def tensorboard_in(folder: Path, trainer: Trainer) -> Iterator[None]:
    """Have TensorBoard's files written to ``folder``, not among the checkpoints, and close them in the end."""
    callbacks = [c for c in trainer.callback_handler.callbacks if isinstance(c, TensorBoardCallback)]
    for callback in callbacks:
        callback.logging_dir = callback.logging_dir or str(folder)  # TENSORBOARD_LOGGING_DIR wins
    try:
        yield
    finally:
        for callback in callbacks:
            if callback.tb_writer is not None:
                callback.tb_writer.close()


def fit(
    trainer: Trainer,
    settings: TrainingSettings,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, float]:
    """Run a trainer to its end, or to a checkpoint when ctrl-C is pressed.

    Returns:
        The Trainer's metrics: ``train_loss``, ``train_runtime`` in seconds, ``eval_loss`` where there is validation
        data, and others.

    Raises:
        Interrupted: ctrl-C; the last checkpoint holds everything up to the last finished step.
        PrefixMemoryError: nothing to resume.
    """
    last = last_checkpoint(Path(str(trainer.args.output_dir))) if resume else None
    args = trainer.args
    rows_a_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    if args.num_train_epochs * math.ceil(len(cast(Any, trainer.train_dataset)) / rows_a_step) <= 1:
        args.warmup_steps = 0  # the learning rate begins at 0: the only step would change nothing
    trainer.remove_callback(PrinterCallback)  # progress is shown by the caller's callbacks, or not at all
    for callback in callbacks:
        trainer.add_callback(callback)
    if settings.patience is not None and trainer.eval_dataset is not None:
        trainer.add_callback(EarlyStoppingCallback(settings.patience))
    with StopOnInterrupt() as stop, contiguous_logits_input(cast(Any, trainer.model)):
        trainer.add_callback(stop)
        result = trainer.train(resume_from_checkpoint=last)
        if stop.asked and trainer.state.global_step < trainer.state.max_steps:
            raise Interrupted
        metrics = dict(result.metrics)
        if trainer.eval_dataset is not None:
            metrics |= trainer.evaluate()
    return metrics


def last_checkpoint(checkpoints: Path) -> str:
    """The checkpoint to resume from.

    Raises:
        PrefixMemoryError: there is none.
    """
    last = last_complete_checkpoint(checkpoints)
    if last is None:
        raise PrefixMemoryError(f"{checkpoints} holds no checkpoint to resume from. Start afresh with --overwrite.")
    return str(last)


def train(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    settings: TrainingSettings,
    checkpoints: Path,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, float]:
    """Train the parameters of ``model`` that require gradients on ``examples``; :func:`fit` in one call.

    Args:
        model: a PEFT model.
        tokenizer: its tokenizer.
        examples: rendered examples; only their completions count in the loss.
        settings: see :class:`TrainingSettings`.
        checkpoints: folder for the Trainer's checkpoints.
        resume: go on from the last checkpoint there.
        callbacks: further Trainer callbacks.

    Returns:
        The Trainer's metrics.

    Raises:
        Interrupted: ctrl-C; the last checkpoint holds everything up to the last finished step.
        PrefixMemoryError: nothing to train, nothing to resume, or an example that does not fit.
    """
    check_trainable(model)
    arguments = training_arguments(settings, checkpoints, evaluates=False)
    use_cache = getattr(model.config, "use_cache", None)
    try:
        features = tokenize(examples, tokenizer, settings.max_length)
        trainer = completion_trainer(model, tokenizer, features, [], arguments)
        return fit(trainer, settings, resume, callbacks)
    finally:
        model.config.use_cache = use_cache  # the Trainer switches it off and leaves it so


def check_trainable(model: PreTrainedModel | PeftModel) -> None:
    """Refuse a model that has nothing to train."""
    if not any(p.requires_grad for p in model.parameters()):
        raise PrefixMemoryError(
            "The model has no trainable parameters. Make it with get_peft_model(model, PrefixMemoryConfig()), or load "
            "an adapter with is_trainable=True."
        )
