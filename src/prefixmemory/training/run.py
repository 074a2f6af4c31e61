"""One training run, from a recipe to the folder with the adapter, its record and its card."""

from __future__ import annotations

import os
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.utils import logging as hub_logging
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.files.full_disk import is_disk_full
from prefixmemory.files.records import RECORD, provenance, write_json
from prefixmemory.models.loading import full_name, load_model, load_tokenizer
from prefixmemory.models.quantization import check_quantization
from prefixmemory.progress import say, say_loading, show_progress
from prefixmemory.training.card import write_model_card
from prefixmemory.training.checkpoints import drop_incomplete
from prefixmemory.training.given_back import given_back
from prefixmemory.training.job import TrainingJob, job_of, rows_of
from prefixmemory.training.loop import (
    check_trackers,
    check_trainable,
    completion_trainer,
    fit,
    last_checkpoint,
    tensorboard_in,
    training_arguments,
)
from prefixmemory.training.methods import attach
from prefixmemory.training.output import Output, remove_run
from prefixmemory.training.preferences import check_trl, preference_trainer
from prefixmemory.training.recipe import Recipe
from prefixmemory.training.record import RunRecord, plan_of_run
from prefixmemory.training.stopwatch import loss_of, seconds_of
from prefixmemory.tuner.layers import reads_by


def quiet_libraries() -> None:
    """Silence what libraries say beside our own lines: progress bars of loading, and two known warnings."""
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    # PEFT looks for the base model's config.json to see whether the vocabulary was changed; a GGUF file has none.
    warnings.filterwarnings("ignore", message="Could not find a config file in")
    # Methods that prepend virtual tokens count positions on their own.
    warnings.filterwarnings("ignore", message="Position ids are not supported for parameter efficient tuning")
    # PEFT 0.21 asks transformers 5.23 for a property under its old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


def run_training(
    model: PreTrainedModel,
    job: TrainingJob,
    output: Output,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> RunRecord:
    """Train an adapter for ``model`` and leave it in ``output``; returns the record that lies beside it.

    Several processes (``accelerate launch``, ``torchrun``) may call it together: the first writes, all train.

    Args:
        model: base model; it gets its adapter for the run, and is given back as it was.
        job: what to train, on what, and how.
        output: where the adapter goes.
        resume: go on with the interrupted run in ``output.partial``.
        overwrite: replace a finished run in ``output``.
        console: where progress is shown; ``None``: nowhere.

    Raises:
        Interrupted: ctrl-C or SIGTERM; ``output.partial`` holds what is needed to resume.
        PrefixMemoryError: bad input; no file was written, changed or deleted.
    """
    with given_back(model), output.held(overwrite, resume) if first_process() else nullcontext():
        return _run(model, job, output, resume, overwrite, console)


def _run(
    model: PreTrainedModel, job: TrainingJob, output: Output, resume: bool, overwrite: bool, console: Console | None
) -> RunRecord:
    writes, settings = first_process(), job.settings
    # what does not fit is refused before anything is written
    job.check_context(model.config)
    plan = plan_of_run(job, model)
    if resume:
        last_checkpoint(output.partial / "checkpoints")
    if console is not None and writes:
        for message in filter(None, (job.cut_message, *job.invoked_again_messages)):
            say(console, message)
    arguments = training_arguments(settings, output.partial / "checkpoints", bool(job.validation), job.report_to)
    torch.manual_seed(settings.seed)
    adapted: Any = None
    try:
        if settings.objective == "sft":
            adapted = attach(model, job.config)
            trainer = completion_trainer(adapted, job.tokenizer, job.tokens_of, job.validation_tokens, arguments)
        else:
            trainer = preference_trainer(model, job, arguments)
            adapted = trainer.model
        check_trainable(adapted)
        adapted.peft_config["default"].base_model_name_or_path = job.base_model
        if writes:
            output.begin(plan, resume, overwrite)
        with tensorboard_in(output.partial / "runs", trainer):
            progress = [show_progress(console)] if console is not None and writes else []
            metrics = fit(trainer, settings, resume, progress)
        outcome = {
            "data": dict(job.data),
            "train_loss": loss_of(trainer) if resume else metrics["train_loss"],
            **({"validation_loss": metrics["eval_loss"]} if "eval_loss" in metrics else {}),
            "train_seconds": round(seconds_of(trainer), 1),
            "trainable_parameters": _size(adapted),
            **({"memory_read": read_by} if (read_by := reads_by(adapted)) else {}),
        }
        record = cast(RunRecord, {**plan, **outcome, **provenance()})
        _save(trainer, output.partial)
        trainer.accelerator.wait_for_everyone()  # another process may still be writing into the last checkpoint
        if writes:
            write_json(output.partial / RECORD, record)
            write_model_card(output.partial, record)
            output.finish()
    except Exception as error:
        if writes and is_disk_full(error):
            raise _disk_full(output) from error
        raise
    finally:
        if isinstance(getattr(adapted, "base_model", None), BaseTuner):
            adapted.unload()
    return record


def _disk_full(output: Output) -> PrefixMemoryError:
    """What to say, once what was being written is gone."""
    shutil.rmtree(output.partial / "saving", ignore_errors=True)
    if drop_incomplete(output.partial / "checkpoints"):
        then = f"The last complete checkpoint is kept in {output.partial}: free some space, and go on with --resume"
    else:
        remove_run(output.partial)
        then = "There was no checkpoint yet: free some space, and start again"
    return PrefixMemoryError(f"The disk of {output.folder} is full. Earlier runs are as they were. {then}.")


def check_installed(recipe: Recipe) -> None:
    """Refuse a recipe that asks for a package which is not installed."""
    check_trackers(recipe.report_to)
    if recipe.quantization is not None:
        check_quantization(recipe.quantization)
    if recipe.training.objective != "sft":
        check_trl(recipe.training.objective)


def run_recipe(recipe: Recipe, resume: bool, overwrite: bool, console: Console) -> RunRecord:
    """Load what a recipe names, and train; see :func:`run_training`."""
    output = Output(Path(recipe.output))
    with output.held(overwrite, resume) if first_process() else nullcontext():
        return _run_recipe(recipe, output, resume, overwrite, console)


def _run_recipe(recipe: Recipe, output: Output, resume: bool, overwrite: bool, console: Console) -> RunRecord:
    check_installed(recipe)  # what can be refused without the model is refused before it is loaded
    rows = rows_of(recipe)
    name = full_name(recipe.model)
    if first_process():
        say_loading(console, recipe.model)
    job = job_of(recipe, name, load_tokenizer(name), rows)
    _ = job.tokens_of(0), job.validation_tokens  # refuses what does not fit
    model = load_model(name, recipe.dtype, recipe.attention, recipe.quantization)
    return run_training(model, job, output, resume, overwrite, console)


def first_process() -> bool:
    """Whether this process writes: the only one, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def _size(model: nn.Module) -> int:
    """Trainable parameters; ZeRO-3 leaves none where they were, and their number beside."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def _save(trainer: Trainer, folder: Path) -> None:
    """The adapter, gathered from all processes, into ``folder``: its config and its weights, nothing else."""
    scratch = folder / "saving"
    trainer.save_model(str(scratch))
    if trainer.is_fsdp_enabled:  # save_model writes no adapter where checkpoints are sharded
        weights = trainer.accelerator.get_state_dict(trainer.model)
        cast(Any, trainer.model).save_pretrained(scratch, state_dict=weights, is_main_process=trainer.args.should_save)
    if trainer.args.should_save:
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            (scratch / name).replace(folder / name)
        shutil.rmtree(scratch)
