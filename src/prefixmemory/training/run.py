"""One training run on disk: a folder that is either absent or complete, whatever happens on the way.

``OUTPUT.partial`` holds the run while it is going on (settings, checkpoints); it becomes ``OUTPUT`` when the adapter
is saved. An earlier ``OUTPUT`` stays until then.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from peft import get_peft_model
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging

from prefixmemory.config import PrefixMemoryConfig
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.training.collator import tokenize
from prefixmemory.training.progress import RichProgress
from prefixmemory.training.recipe import TrainingSettings, train
from prefixmemory.training.record import provenance, write_json
from prefixmemory.training.rows import render, row_format

RECORD = "run.json"


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
        for path in (self.folder, *self.folder.parents):
            if path.exists() and not path.is_dir():
                raise PrefixMemoryError(f"{path} is a file. Give a folder that does not exist yet.")
        if self.folder.is_dir() and any(self.folder.iterdir()):
            if not (self.folder / RECORD).is_file():
                raise PrefixMemoryError(
                    f"{self.folder} holds files that are no run of prefixmemory. Give a folder that does not exist yet."
                )
            if not (overwrite or resume):
                raise PrefixMemoryError(
                    f"{self.folder} already holds a finished run. Give another folder, or --overwrite to replace it "
                    "once the new run is complete."
                )
        for path in (self.partial, self.replaced):
            if path.exists() and not (path / RECORD).is_file():
                raise PrefixMemoryError(f"{path} holds files that are no run of prefixmemory. Give another folder.")
        if resume and not (self.partial / RECORD).is_file():
            raise PrefixMemoryError(f"There is no interrupted run at {self.partial}. Leave --resume out to start one.")
        if self.partial.exists() and not (resume or overwrite):
            raise PrefixMemoryError(
                f"{self.partial} holds an interrupted run. Give --resume to go on with it, or --overwrite to start "
                "afresh."
            )

    def begin(self, plan: dict[str, Any], resume: bool) -> None:
        """Write down what is going to be run, or check that an interrupted run was the same.

        Raises:
            PrefixMemoryError: resuming with other settings than the interrupted run's.
        """
        if not resume:
            if self.partial.exists():
                shutil.rmtree(self.partial)
            write_json(self.partial / RECORD, plan)
            return
        before = json.loads((self.partial / RECORD).read_text(encoding="utf-8"))
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
    # PEFT 0.21 asks transformers 5.23 for a property under its old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


def run_training(
    model: PreTrainedModel,
    model_name: str,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    output: Output,
    settings: TrainingSettings,
    config: PrefixMemoryConfig,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train a memory for ``model`` on ``rows`` and leave it in ``output``; returns the record that lies beside it.

    Raises:
        Interrupted: ctrl-C; ``output.partial`` holds what is needed to resume.
        PrefixMemoryError: bad input; nothing on disk was touched.
    """
    output.check(overwrite, resume)
    examples = render(rows, tokenizer)
    tokenize(examples, tokenizer, settings.max_length)  # what does not fit is refused before anything is written
    plan = {
        "base_model": model_name,
        "config": {k: v for k, v in vars(config).items() if k in PrefixMemoryConfig.__annotations__},
        "settings": asdict(settings),
        "rows": len(rows),
        "row_format": row_format(rows),
        "rows_sha256": hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    plan = json.loads(json.dumps(plan, default=sorted))  # as it will be read back: sets become lists
    torch.manual_seed(settings.seed)
    adapted: Any = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = model_name
    try:
        output.begin(plan, resume)
        started = time.monotonic()
        callbacks: list[TrainerCallback] = [RichProgress(console)] if console is not None else []
        metrics = train(adapted, tokenizer, examples, settings, output.partial / "checkpoints", resume, callbacks)
    except BaseException:
        adapted.unload()
        raise
    record = {
        **plan,
        "train_loss": metrics["train_loss"],
        "train_seconds": round(time.monotonic() - started, 1),
        "trainable_parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        **provenance(),
    }
    adapted.save_pretrained(str(output.partial))
    (output.partial / "README.md").unlink(missing_ok=True)  # PEFT's model card is a form without content
    write_json(output.partial / RECORD, record)
    output.finish()
    adapted.unload()
    return record


def interrupted_message(output: Output, command: str) -> str:
    """What to tell a user whose run was stopped."""
    return f"Stopped. The checkpoint is kept in {output.partial}. To go on: {command} --resume"
