"""One training run on disk: a folder that is either absent or complete, whatever happens on the way.

``OUTPUT.partial`` holds the run while it is going on (settings, checkpoints); it becomes ``OUTPUT`` when the adapter
is saved. An earlier ``OUTPUT`` stays until then.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.utils import logging as hub_logging
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.utils import logging

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.files.records import RECORD, provenance, write_json
from prefixmemory.models.loading import full_name, load_model, load_tokenizer
from prefixmemory.models.quantization import check_quantization
from prefixmemory.progress import say_loading, show_progress
from prefixmemory.rows.collator import tokenize
from prefixmemory.rows.rows import Row, Rows, check_objective, render, row_format
from prefixmemory.training.card import CARD, write_model_card
from prefixmemory.training.loop import (
    check_trackers,
    check_trainable,
    completion_trainer,
    fit,
    last_checkpoint,
    tensorboard_in,
    training_arguments,
)
from prefixmemory.training.methods import attach, choices, method_name
from prefixmemory.training.preferences import check_trl, preference_trainer, with_one_answer
from prefixmemory.training.recipe import Recipe
from prefixmemory.training.settings import TrainingSettings

#: What a finished run's folder holds; whatever else lies there is the user's.
OWN = {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, RECORD, CARD, "runs", "checkpoints"}


@dataclass(frozen=True)
class Output:
    """Where a run goes: ``folder`` when it is complete, ``partial`` until then."""

    folder: Path

    @property
    def partial(self) -> Path:
        """The folder of the run in progress."""
        return self.folder.with_name(f"{self.folder.name}.partial")

    @property
    def replaced(self) -> Path:
        """Where the earlier run stands while a new one takes its place."""
        return self.folder.with_name(f"{self.folder.name}.replaced")

    def check(self, overwrite: bool, resume: bool) -> None:
        """Refuse to lose anything.

        Raises:
            PrefixMemoryError: the folder holds something and ``overwrite`` is not given, an interrupted run lies there
                and neither is given, or there is nothing to resume.
        """
        if overwrite and resume:
            raise PrefixMemoryError("--overwrite and --resume exclude each other: start afresh, or go on.")
        if not self.folder.name:
            raise PrefixMemoryError(f"{self.folder} names no new folder. Give a folder that does not exist yet.")
        if self.folder.is_symlink() or self.folder.is_mount():
            raise PrefixMemoryError(
                f"{self.folder} is a link or a mount, which no run can replace. Give a folder in it."
            )
        for path in (self.folder, *self.folder.parents):
            if path.exists() and not path.is_dir():
                raise PrefixMemoryError(f"{path} is a file. Give a folder that does not exist yet.")
        if self.folder.is_dir() and any(self.folder.iterdir()):
            if not (self.folder / RECORD).is_file():
                raise PrefixMemoryError(
                    f"{self.folder} holds files that are no run of prefixmemory. Give a folder that does not exist yet."
                )
            foreign = sorted(path.name for path in self.folder.iterdir() if path.name not in OWN)
            if foreign:
                raise PrefixMemoryError(
                    f"{self.folder} holds {foreign[0]!r}, which no run wrote and which would be deleted with the "
                    "earlier run. Move it away, or give another folder."
                )
            if not (overwrite or resume):
                raise PrefixMemoryError(
                    f"{self.folder} already holds a finished run. Give another folder, or --overwrite to replace it "
                    "once the new run is complete."
                )
        for path in (self.partial, self.replaced):
            # the Trainer makes an empty folder for checkpoints before anything is written down
            if not (path / RECORD).is_file() and any(not found.is_dir() for found in path.rglob("*")):
                raise PrefixMemoryError(f"{path} holds files that are no run of prefixmemory. Give another folder.")
        if resume and not (self.partial / RECORD).is_file():
            raise PrefixMemoryError(f"There is no interrupted run at {self.partial}. Leave --resume out to start one.")
        if (self.partial / RECORD).exists() and not (resume or overwrite):
            raise PrefixMemoryError(
                f"{self.partial} holds an interrupted run. Give --resume to go on with it, or --overwrite to start "
                "afresh."
            )

    def begin(self, plan: dict[str, Any], resume: bool, overwrite: bool = False) -> None:
        """Write down what is going to be run, or check that an interrupted run was the same.

        Raises:
            PrefixMemoryError: resuming with other settings than the interrupted run's.
        """
        if not resume:
            if overwrite and self.partial.exists():
                shutil.rmtree(self.partial)
            try:
                self.partial.mkdir(parents=True, exist_ok=True)
                (self.partial / RECORD).open("x").close()  # of two runs that begin at once, one gets it
            except FileExistsError as error:
                raise PrefixMemoryError(
                    f"Another run has just begun in {self.partial}. Give another folder."
                ) from error
            except OSError as error:
                raise PrefixMemoryError(
                    f"{self.partial} cannot be made: {error.strerror}. Give another folder."
                ) from error
            write_json(self.partial / RECORD, plan)
            return
        written = (self.partial / RECORD).read_bytes()
        if not written:  # the machine died between making the file and writing it
            raise PrefixMemoryError(f"The run at {self.partial} was stopped before it began. Use --overwrite.")
        before = json.loads(written)
        for field, value in plan.items():
            if before.get(field) != value:
                raise PrefixMemoryError(
                    f"The interrupted run at {self.partial} had {field}={before.get(field)!r}, now it is {value!r}. "
                    "Resume with the same values, or start afresh with --overwrite."
                )

    def finish(self) -> None:
        """Put the complete run in its place."""
        if self.folder.exists():
            if self.replaced.exists():  # left by a process that was killed between the two renames below
                shutil.rmtree(self.replaced)
            self.folder.replace(self.replaced)
        try:
            self.partial.replace(self.folder)
        except OSError:
            if self.replaced.exists():
                self.replaced.replace(self.folder)
            raise
        # last, so that a run that was stopped on the way here can be resumed
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        shutil.rmtree(self.replaced, ignore_errors=True)


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
    model_name: str,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    output: Output,
    settings: TrainingSettings,
    config: PeftConfig,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    validation: Rows = (),
    data: Mapping[str, Any] | None = None,
    report_to: Sequence[str] = (),
    quantization: str | None = None,
) -> dict[str, Any]:
    """Train an adapter for ``model`` on ``rows`` and leave it in ``output``; returns the record that lies beside it.

    Several processes (``accelerate launch``, ``torchrun``) may call it together: the first writes, all train.

    Args:
        model: base model; it gets its adapter for the run, and is given back as it was.
        model_name: what the adapter's config names as its base model.
        tokenizer: its tokenizer.
        rows: training rows.
        output: where the adapter goes.
        settings: how to train.
        config: PEFT config of the adapter.
        resume: go on with the interrupted run in ``output.partial``.
        overwrite: replace a finished run in ``output``.
        console: where progress is shown; ``None``: nowhere.
        validation: rows for the validation loss.
        data: names of the data, for the record.
        report_to: trackers that receive the metrics.
        quantization: how ``model`` was quantised when it was loaded, for the record.

    Raises:
        Interrupted: ctrl-C; ``output.partial`` holds what is needed to resume.
        PrefixMemoryError: bad input; no file was written, changed or deleted.
    """
    writes = first_process()
    if writes:
        output.check(overwrite, resume)
    check_objective(settings.objective, rows)
    # what does not fit is refused before anything is written
    features, held_out = (features_of(part, tokenizer, settings) for part in (rows, validation))
    check_context(model, (*features, *held_out))
    plan = {**_plan(model, model_name, rows, validation, settings, config), "quantization": quantization}
    if resume:
        last_checkpoint(output.partial / "checkpoints")
    use_cache = getattr(model.config, "use_cache", None)
    arguments = training_arguments(settings, output.partial / "checkpoints", bool(validation), report_to)
    torch.manual_seed(settings.seed)
    adapted: Any = None
    try:
        if settings.objective == "sft":
            adapted = attach(model, config)
            trainer = completion_trainer(adapted, tokenizer, features, held_out, arguments)
        else:
            trainer = preference_trainer(model, config, tokenizer, rows, validation, settings, arguments)
            adapted = trainer.model
        check_trainable(adapted)
        adapted.peft_config["default"].base_model_name_or_path = model_name
        if writes:
            output.begin(plan, resume, overwrite)
        started = time.monotonic()
        with tensorboard_in(output.partial / "runs", trainer):
            progress = [show_progress(console)] if console is not None and writes else []
            metrics = fit(trainer, settings, resume, progress)
        record = {
            **plan,
            "data": dict(data or {}),
            "train_loss": _train_loss(trainer, metrics, resume),
            **({"validation_loss": metrics["eval_loss"]} if "eval_loss" in metrics else {}),
            "train_seconds": round(time.monotonic() - started, 1),
            "processes": trainer.args.world_size,
            "trainable_parameters": _size(adapted),
            **provenance(),
        }
        _save(trainer, output.partial)
        trainer.accelerator.wait_for_everyone()  # another process may still be writing into the last checkpoint
        if writes:
            write_json(output.partial / RECORD, record)
            write_model_card(output.partial, record)
            output.finish()
    finally:
        model.config.use_cache = use_cache  # the Trainer switches it off and leaves it so
        if isinstance(getattr(adapted, "base_model", None), BaseTuner):
            adapted.unload()
    return record


def rows_of(recipe: Recipe) -> tuple[list[Row], list[Row]]:
    """Training and validation rows of a recipe, every one checked, also for its objective."""
    seed = recipe.training.seed
    rows, validation = recipe.data.training_rows(seed), recipe.data.validation_rows(seed)
    for part in (rows, validation):
        if part:
            check_objective(recipe.training.objective, part)
    return rows, validation


def features_of(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: TrainingSettings, max_length: int | None = None
) -> list[dict[str, list[int]]]:
    """Rows as tokens; rows with several answers once for each.

    Raises:
        PrefixMemoryError: an answer does not fit into ``max_length`` (default: that of ``settings``).
    """
    if settings.objective != "sft":
        rows = with_one_answer(rows)
    return tokenize(render(rows, tokenizer), tokenizer, max_length or settings.max_length)


def check_context(model: PreTrainedModel, features: Sequence[Mapping[str, Sequence[int]]]) -> None:
    """Refuse rows that are longer than the base model can read."""
    longest = max((len(feature["input_ids"]) for feature in features), default=0)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or longest
    if longest > limit:
        raise PrefixMemoryError(
            f"The longest row has {longest} tokens, and the base model reads {limit} at most. Set max_length={limit}."
        )


def check_installed(recipe: Recipe) -> None:
    """Refuse a recipe that asks for a package which is not installed."""
    check_trackers(recipe.report_to)
    if recipe.quantization is not None:
        check_quantization(recipe.quantization)
    if recipe.training.objective != "sft":
        check_trl(recipe.training.objective)


def run_recipe(recipe: Recipe, resume: bool, overwrite: bool, console: Console) -> dict[str, Any]:
    """Load what a recipe names, and train; see :func:`run_training`."""
    output = Output(Path(recipe.output))
    if first_process():  # what can be refused without the model is refused before it is loaded
        output.check(overwrite, resume)
    check_installed(recipe)
    rows, validation = rows_of(recipe)
    name = full_name(recipe.model)
    if first_process():
        say_loading(console, recipe.model)
    tokenizer = load_tokenizer(name)
    for part in (rows, validation):
        features_of(part, tokenizer, recipe.training)  # refuses what does not fit
    return run_training(
        load_model(name, recipe.dtype, recipe.attention, recipe.quantization),
        name,
        tokenizer,
        rows,
        output,
        recipe.training,
        recipe.config(),
        resume,
        overwrite,
        console,
        validation,
        {name: value for name, value in asdict(recipe.data).items() if value is not None},
        recipe.report_to,
        recipe.quantization,
    )


def first_process() -> bool:
    """Whether this process writes: the only one, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def _plan(
    model: PreTrainedModel,
    model_name: str,
    rows: Rows,
    validation: Rows,
    settings: TrainingSettings,
    config: PeftConfig,
) -> dict[str, Any]:
    """What is going to be run: what a run that is resumed must have in common with the interrupted one."""
    plan = {
        "base_model": model_name,
        "method": method_name(config),
        "config": choices(config),
        "settings": asdict(settings),
        "rows": len(rows),
        "row_format": row_format(rows),
        "rows_sha256": checksum(rows),
        "validation_sha256": checksum(validation) if validation else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": getattr(model.config, "_attn_implementation", None),
    }
    # As it will be read back: sets become lists.
    as_read = json.dumps(plan, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    return cast(dict[str, Any], json.loads(as_read))


def checksum(rows: Rows) -> str:
    """Of rows as they were read; Parquet holds dates and bytes beside texts."""
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True, default=str).encode()).hexdigest()


def _train_loss(trainer: Trainer, metrics: Mapping[str, float], resumed: bool) -> float:
    """Mean loss of the run; the Trainer's own figure forgets what was before a resume."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return sum(losses) / len(losses) if resumed and losses else metrics["train_loss"]


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


def interrupted_message(output: Output, command: str) -> str:
    """What to tell a user whose run was stopped."""
    return f"Stopped. The checkpoint is kept in {output.partial}. To go on: {command} --resume"
