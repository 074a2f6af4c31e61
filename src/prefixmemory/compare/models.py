"""The models of a comparison: the base model, loaded once, and what each method makes of it."""

from __future__ import annotations

import copy
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixmemory.compare.method import Method
from prefixmemory.compare.records import Provenance, Training
from prefixmemory.compare.suite import Suite
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.files.json_text import read_object
from prefixmemory.files.records import RECORD
from prefixmemory.memories.checkpoint import fingerprint
from prefixmemory.models.loading import full_name, load_model, load_tokenizer
from prefixmemory.rows.rows import Row
from prefixmemory.training.given_back import given_back
from prefixmemory.training.job import TrainingJob
from prefixmemory.training.loop import completion_trainer, fit, training_arguments
from prefixmemory.training.output import Output
from prefixmemory.training.run import run_training
from prefixmemory.training.settings import TrainingSettings

#: A model to be scored, and how it was trained, if it was.
Trained = tuple[PreTrainedModel | PeftModel, Training | None]


class Models:
    """The base model of a suite, never changed, and models that are trained from it.

    Args:
        suite: names it, and says how it is loaded and trained.
    """

    def __init__(self, suite: Suite) -> None:
        self.suite = suite

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the base model."""
        return load_tokenizer(full_name(self.suite.model))

    @cached_property
    def base(self) -> PreTrainedModel:
        """The base model."""
        return load_model(full_name(self.suite.model), self.suite.dtype, self.suite.attention)

    @cached_property
    def fingerprint(self) -> list[float | None] | None:
        """A sample of the base model's weights; ``None`` where they cannot be read."""
        return fingerprint(self.base)

    @contextmanager
    def trained(self, method: Method, rows: list[Row], settings: TrainingSettings, folder: Path) -> Iterator[Trained]:
        """What ``method`` makes of the base model; an adapter comes off again.

        Args:
            method: any; what is not trained is the base model.
            rows: to train on.
            settings: of the training.
            folder: of the adapter; one that is there is not trained again.
        """
        if not method.is_trained:
            yield self.base, None
        elif method.kind == "full":
            yield self._in_full(rows, settings)
        else:
            if not (folder / RECORD).is_file():
                self._train(folder, method, rows, settings)
            with given_back(self.base):
                model = PeftModel.from_pretrained(self.base, str(folder)).eval()
                try:
                    yield model, _as_trained(folder, settings)
                finally:
                    if isinstance(model.base_model, BaseTuner):
                        model.unload()

    def _train(self, folder: Path, method: Method, rows: list[Row], settings: TrainingSettings) -> None:
        """Leave a trained adapter in ``folder``; one that was interrupted is begun again."""
        output = Output(folder)
        if self.suite.launcher is None:
            job = TrainingJob(full_name(self.suite.model), self.tokenizer, rows, method.config(), settings)
            run_training(self.base, job, output, overwrite=True)
            return
        with tempfile.TemporaryDirectory() as scratch:
            data, recipe = Path(scratch) / "rows.jsonl", Path(scratch) / "recipe.yaml"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            content = {
                "model": self.suite.model,
                "output": str(folder),
                "data": {"train": str(data)},
                "method": method.adapter,
                "training": asdict(settings),
                "dtype": self.suite.dtype,
                "attention": self.suite.attention,
            }
            recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
            words = [*self.suite.launcher, "-m", "prefixmemory_cli", "train", str(recipe), "--overwrite"]
            ended = subprocess.run(words, capture_output=True, text=True)
            if ended.returncode:
                lines = ended.stderr.strip().splitlines() or ["no message"]
                line = next((line for line in reversed(lines) if "rror" in line), lines[-1])
                raise PrefixMemoryError(f"{' '.join(self.suite.launcher)} ended with {ended.returncode}: {line}")

    def _in_full(self, rows: list[Row], settings: TrainingSettings) -> Trained:
        """A copy of the base model, all of it trained, in float32 as adapters are; too large to keep."""
        if settings.objective != "sft" or self.suite.launcher is not None:
            raise PrefixMemoryError("kind: full trains likelihoods (objective: sft) in one process only.")
        model: PreTrainedModel = copy.deepcopy(self.base).float().requires_grad_(True)
        torch.manual_seed(settings.seed)
        started = time.monotonic()
        job = TrainingJob(full_name(self.suite.model), self.tokenizer, rows, PeftConfig(), settings)
        with tempfile.TemporaryDirectory() as scratch:
            arguments = training_arguments(settings, Path(scratch), evaluates=False)
            metrics = fit(completion_trainer(model, self.tokenizer, job.tokens_of, [], arguments), settings)
        size = sum(p.numel() for p in model.parameters())
        cast(Any, model).to(self.base.dtype)  # as the others are scored
        return model.eval(), Training(
            settings=asdict(settings),
            trainable_parameters=size,
            file_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
            rows=len(rows),
            loss=metrics["train_loss"],
            seconds=round(time.monotonic() - started, 1),
        )


def _as_trained(folder: Path, settings: TrainingSettings) -> Training:
    """What the run record in an adapter's folder says."""
    trained = read_object(folder / RECORD, "Delete the folder; it will be trained again.")
    return Training(
        settings=asdict(settings),
        trainable_parameters=trained["trainable_parameters"],
        file_bytes=(folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size,
        rows=trained["rows"],
        loss=trained["train_loss"],
        seconds=trained["train_seconds"],
        adapter={"name": trained["method"], **trained["config"]},
        processes=trained.get("processes", 1),
        made_with=Provenance(**{name: trained[name] for name in _MADE_WITH if name in trained}),
    )


_MADE_WITH = [one.name for one in fields(Provenance)]
