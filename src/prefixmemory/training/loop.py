"""The training loop: transformers' Trainer with the settings that suit a memory, interruptible and resumable."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
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
    TrainingArguments,
)
from transformers.integrations.integration_utils import TensorBoardCallback

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.models.logits import contiguous_logits_input
from prefixmemory.rows.collator import collator
from prefixmemory.rows.encoding import Tokens, tokenize
from prefixmemory.rows.invocation import check_invoked
from prefixmemory.rows.rendering import Example
from prefixmemory.training.checkpoints import is_sharded, last_complete_checkpoint
from prefixmemory.training.divergence import StopDiverged
from prefixmemory.training.ended import had_ended, has_ended, take_over
from prefixmemory.training.interrupt import Interrupted, StopOnSignal
from prefixmemory.training.sampler import EpochRows, EpochSampler, RowsOfEpoch
from prefixmemory.training.saving import SaveByTime
from prefixmemory.training.settings import TrainingSettings
from prefixmemory.training.silent_front import SilentFront
from prefixmemory.training.stopwatch import LogWithSave, Stopwatch, loss_of

#: transformers 5.23 renamed the argument.
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in inspect.signature(TrainingArguments).parameters
    else "gradient_checkpointing"
)


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
        # transformers' "constant" has no warm-up
        "lr_scheduler_type": "constant_with_warmup" if settings.scheduler == "constant" else settings.scheduler,
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


def on_one_gpu(args: TrainingArguments) -> TrainingArguments:
    """``args`` for one GPU a process: where it sees several, the Trainer would run ``nn.DataParallel``, and a step
    would take a batch for each of them, whatever the settings say."""
    args._n_gpu = min(args.n_gpu, 1)
    return args


def check_trackers(report_to: Sequence[str]) -> None:
    """Refuse trackers that are not installed."""
    for tracker in report_to:
        if find_spec(tracker) is None:
            raise PrefixMemoryError(f"report_to={tracker!r} needs the package: pip install {tracker}.")


class CompletionTrainer(Trainer):
    """Orders its rows with :class:`EpochSampler`, and reads what stands in front of all invocations without gradients:
    :class:`SilentFront`."""

    front: SilentFront | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        args = self.args
        dataset = cast(EpochRows, self.train_dataset if train_dataset is None else train_dataset)
        return EpochSampler(args.train_batch_size * args.gradient_accumulation_steps, dataset, args.seed)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers."""
        checkpointing = getattr(self.args, CHECKPOINTING)  # goes without a cache
        if model.training and torch.is_grad_enabled() and not checkpointing:
            self.front = self.front or SilentFront(model)
            inputs = self.front.read(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)


def completion_trainer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows_of: RowsOfEpoch,
    validation: Sequence[Tokens],
    arguments: dict[str, Any],
) -> Trainer:
    """A Trainer for the likelihood of completions (``objective="sft"``)."""
    return CompletionTrainer(
        model=model,
        args=on_one_gpu(TrainingArguments(**arguments, remove_unused_columns=False)),
        train_dataset=EpochRows(rows_of),
        eval_dataset=Dataset.from_list([one.feature for one in validation]) if validation else None,
        data_collator=collator(model, tokenizer),
    )


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
    """Run a trainer to its end, or to a checkpoint on ctrl-C or SIGTERM.

    Returns:
        The Trainer's metrics: ``train_loss``, ``eval_loss`` where there is validation data, and, unless nothing was
        left to be trained, ``train_runtime`` in seconds and others.

    Raises:
        Interrupted: ctrl-C or SIGTERM; the last checkpoint holds everything up to the last finished step.
        PrefixMemoryError: nothing to resume, or the run diverged.
    """
    last = last_checkpoint(Path(str(trainer.args.output_dir))) if resume else None
    args = trainer.args
    rows_a_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    if args.num_train_epochs * math.ceil(len(cast(Any, trainer.train_dataset)) / rows_a_step) <= 1:
        args.warmup_steps = 0  # the learning rate begins at 0: the only step would change nothing
    trainer.add_callback(Stopwatch())
    trainer.remove_callback(PrinterCallback)  # progress is shown by the caller's callbacks, or not at all
    for callback in callbacks:
        trainer.add_callback(callback)
    if settings.save_minutes is not None:
        trainer.add_callback(SaveByTime(60.0 * settings.save_minutes))
    if settings.patience is not None and trainer.eval_dataset is not None:
        trainer.add_callback(EarlyStoppingCallback(settings.patience))
    with StopOnSignal() as stop, contiguous_logits_input(cast(Any, trainer.model)):
        trainer.add_callback(stop)
        trainer.add_callback(LogWithSave())
        trainer.add_callback(diverged := StopDiverged())
        if last is not None and not is_sharded(Path(last)) and had_ended(Path(last), settings.patience):
            take_over(trainer, Path(last), settings.keeps_best)
            metrics = {"train_loss": loss_of(trainer)}
        else:
            metrics = dict(trainer.train(resume_from_checkpoint=last).metrics)
            if stop.asked and not has_ended(trainer):
                raise Interrupted(stop.asked)
        diverged.check(trainer)
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
        Interrupted: ctrl-C or SIGTERM; the last checkpoint holds everything up to the last finished step.
        PrefixMemoryError: nothing to train, nothing to resume, an example that does not fit, settings of a recipe that
            mean nothing here, or the run diverged.
    """
    check_trainable(model)
    if settings.objective != "sft" or settings.keeps_best or settings.distractors is not None:
        raise PrefixMemoryError(
            "train() learns the examples as they are: leave objective, keep_best, patience and distractors out of its "
            "settings, or run a recipe."
        )
    arguments = training_arguments(settings, checkpoints, evaluates=False)
    use_cache = getattr(model.config, "use_cache", None)
    try:
        rows = tokenize(examples, tokenizer, settings.max_length)
        if (invocation := collator(model, tokenizer).invocation) is not None:
            places = [one.where or f"Row {number}" for number, one in enumerate(examples, 1)]
            check_invoked(rows, invocation, places)
        trainer = completion_trainer(model, tokenizer, lambda epoch: rows, [], arguments)
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
