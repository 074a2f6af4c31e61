"""One run: train (or find the trained weights), score, and say everything about it in one record."""

from __future__ import annotations

import copy
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixmemory.compare.method import Method
from prefixmemory.compare.runs import Run, writes_answers
from prefixmemory.compare.store import Store
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.files.records import RECORD, provenance, write_json
from prefixmemory.models.loading import full_name, load_model, load_tokenizer
from prefixmemory.rows.rendering import render
from prefixmemory.rows.rows import Row, with_one_answer
from prefixmemory.rows.unrelated_text import unrelated_text
from prefixmemory.scoring.generation import answers, longest_label
from prefixmemory.tasks import Task
from prefixmemory.tasks.outputs import alpaca_eval, prompts
from prefixmemory.tasks.scoring import Scored, score
from prefixmemory.tasks.task import Split, sample_rows
from prefixmemory.training.interrupt import Interrupted
from prefixmemory.training.job import TrainingJob
from prefixmemory.training.loop import train
from prefixmemory.training.output import Output
from prefixmemory.training.run import run_training
from prefixmemory.training.settings import TrainingSettings

LONGEST_ANSWER = 256  # tokens of a free answer, where the task does not say
NEUTRAL_TOKENS = 1024  # of the shipped essay: what an adapter forgets is read off its likelihood


class Worker:
    """Runs of one suite, one after the other, on one base model that is loaded once.

    Args:
        store: where records and adapters go; it knows the suite.
        data: folder of the tasks' data; ``None``: their own files, or the Hub.
    """

    def __init__(self, store: Store, data: Path | None) -> None:
        self.store, self.loaded, self.data = store, store.loaded, data
        self.suite = store.loaded.suite
        self.made_with = provenance()  # of the code that is running, whatever is edited meanwhile

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the base model."""
        return load_tokenizer(full_name(self.suite.model))

    @cached_property
    def base(self) -> PreTrainedModel:
        """The base model, never changed."""
        return load_model(full_name(self.suite.model), self.suite.dtype, self.suite.attention)

    def load(self) -> None:
        """Load tokenizer and base model, if that has not been done.

        Raises:
            PrefixMemoryError: they cannot be loaded.
        """
        _ = self.tokenizer, self.base

    def run(self, run: Run) -> dict[str, Any]:
        """The record of ``run``; a run that fails has an ``error`` in the place of its scores."""
        method, task = self.loaded.methods[run.method], self.loaded.tasks[run.task]
        head = {**asdict(run), "suite": self.suite.name, "base_model": self.suite.model, "kind": method.kind}
        weights = full_name(self.suite.model)  # a folder or file without its place on this machine
        head["base_weights"] = Path(weights).name if Path(weights).exists() else weights
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            found = self._run(run, task, method)
        except Interrupted:
            raise KeyboardInterrupt from None
        except Exception as error:  # whatever it is, the others go on, and the record tells
            text = " ".join(str(error).split())[:500]
            found = {"error": {"type": type(error).__name__, "message": text}}
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if torch.cuda.is_available():
            found["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        return {**head, **found, **self.made_with}

    def _run(self, run: Run, task: Task, method: Method) -> dict[str, Any]:
        split = task.split(self.data, self.suite.validation_rows, self.suite.test_rows, run.seed)
        shots = self.examples(task, split.train, method.shots) if method.shots else ""
        settings = self.loaded.settings(task, method, run.learning_rate or 1.0, run.seed)
        with self._model(run, method, split, settings) as (model, trained), self._scoring(model):
            if run.stage == "rate":
                return {**trained, "validation": self._score(model, task, split.validation, shots, settings)}
            record = {**trained, "test": self._score(model, task, split.test, shots, settings)}
            if run.chosen:
                behind = sample_rows(split.test, self.suite.long_input_rows, "long input")
                for tokens in sorted(self.suite.long_input):
                    text = unrelated_text(self.tokenizer, tokens) + shots
                    record.setdefault("long_input", {})[str(tokens)] = self._score(model, task, behind, text, settings)
                if self.suite.long_input:  # the same rows without the text in front
                    record["long_input"]["0"] = self._score(model, task, behind, shots, settings)
                for other in task.transfers_to if self.suite.transfer_rows else ():
                    record.setdefault("transfer", {})[other] = self._transfer(model, self.loaded.task(other))
                if writes_answers(self.loaded, task):
                    self._write_answers(run, model, task, split.test, shots)
                record["neutral_text"] = self._neutral(model)
                record["decoding"] = self._decoding(model)
            return record

    # Training

    @contextmanager
    def _model(
        self, run: Run, method: Method, split: Split, settings: TrainingSettings
    ) -> Iterator[tuple[PreTrainedModel | PeftModel, dict[str, Any]]]:
        """The model to be scored, and what training it left to say."""
        if not method.is_trained:
            yield self.base, {}
            return
        if method.kind == "full":
            if settings.objective != "sft" or self.suite.launcher is not None:
                raise PrefixMemoryError("kind: full trains likelihoods (objective: sft) in one process only.")
            yield self._trained_in_full(split.train, settings)
            return
        folder = self.store.adapter(run)
        if not (folder / RECORD).is_file():
            self._train(folder, method, split.train, settings)
        trained = json.loads((folder / RECORD).read_bytes())
        model = PeftModel.from_pretrained(self.base, str(folder)).eval()
        try:
            yield (
                model,
                {
                    "adapter": {"name": trained["method"], **trained["config"]},
                    "settings": asdict(settings),
                    "trainable_parameters": trained["trainable_parameters"],
                    "file_bytes": (folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size,
                    "trained_with": {name: trained.get(name) for name in ("commit", "versions", "hardware", "threads")},
                    "processes": trained.get("processes", 1),
                    "train_rows": trained["rows"],
                    "train_loss": trained["train_loss"],
                    "train_seconds": trained["train_seconds"],
                },
            )
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
            words = [*self.suite.launcher, "-m", "prefixmemory", "train", str(recipe), "--overwrite"]
            ended = subprocess.run(words, capture_output=True, text=True)
            if ended.returncode:
                lines = ended.stderr.strip().splitlines() or ["no message"]
                line = next((line for line in reversed(lines) if "rror" in line), lines[-1])
                raise PrefixMemoryError(f"{' '.join(self.suite.launcher)} ended with {ended.returncode}: {line}")

    def _trained_in_full(self, rows: list[Row], settings: TrainingSettings) -> tuple[PreTrainedModel, dict[str, Any]]:
        """A copy of the base model, all of it trained, in float32 as adapters are; too large to keep."""
        model: PreTrainedModel = copy.deepcopy(self.base).float().requires_grad_(True)
        torch.manual_seed(settings.seed)
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            metrics = train(model, self.tokenizer, render(rows, self.tokenizer), settings, Path(scratch))
        size = sum(p.numel() for p in model.parameters())
        cast(Any, model).to(self.base.dtype)  # as the others are scored
        return model.eval(), {
            "settings": asdict(settings),
            "trainable_parameters": size,
            "file_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
            "train_rows": len(rows),
            "train_loss": metrics["train_loss"],
            "train_seconds": round(time.monotonic() - started, 1),
        }

    # Scoring

    @contextmanager
    def _scoring(self, model: PreTrainedModel | PeftModel) -> Iterator[None]:
        """Fused attention, the faster one behind long texts, whatever training used; it rounds otherwise."""
        scored = model.get_base_model() if isinstance(model, PeftModel) else model
        trained_with = scored.config._attn_implementation
        if trained_with == "eager":
            scored.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            scored.set_attn_implementation(trained_with)

    def examples(self, task: Task, rows: list[Row], shots: int) -> str:
        """The first ``shots`` rows of each label, rendered one behind the other."""
        counts: dict[str, int] = {}
        chosen = []
        for row in rows:
            label = row["label"] if task.scoring == "exact_match" and "label" in row else ""
            counts[label] = counts.get(label, 0) + 1
            if counts[label] <= shots:
                chosen.append(row)
        if task.scoring == "preference":
            chosen = with_one_answer(chosen)[::2]  # the better answer
        eos = str(self.tokenizer.eos_token)
        texts = (example.prompt + example.completion.removesuffix(eos) for example in render(chosen, self.tokenizer))
        return "".join(f"{text}\n\n" for text in texts)

    def _score(
        self,
        model: PreTrainedModel | PeftModel,
        task: Task,
        rows: list[Row],
        context: str,
        settings: TrainingSettings | None = None,
    ) -> dict[str, Any]:
        length = longest_label(rows, self.tokenizer) if "label" in rows[0] and task.scoring == "exact_match" else 32
        scored = score(model, self.tokenizer, task, rows, context, length, settings=settings)
        return _as_record(scored, task.scoring)

    def _transfer(self, model: PreTrainedModel | PeftModel, other: Task) -> dict[str, Any]:
        """Another task's test rows, with one of its examples a label in the prompt: what is left of the base model."""
        split = other.split(self.data, self.suite.validation_rows, self.suite.transfer_rows, self.suite.seeds[0])
        return self._score(model, other, split.test, self.examples(other, split.train, 1))

    def _write_answers(
        self, run: Run, model: PreTrainedModel | PeftModel, task: Task, rows: list[Row], context: str
    ) -> None:
        """Leave answers to some test rows as AlpacaEval reads them, for users who have a judge."""
        rows = sample_rows(rows, self.suite.written_answers, "answers")
        length = task.max_new_tokens or LONGEST_ANSWER
        asked = prompts(rows, self.tokenizer)
        said = answers(model, self.tokenizer, asked, length, context=context, one_line=False)
        write_json(self.store.outputs(run), alpaca_eval(rows, said, f"{run.method}, seed {run.seed}", task.name))

    @torch.inference_mode()
    def _neutral(self, model: PreTrainedModel | PeftModel) -> dict[str, float]:
        """Negative log-likelihood of the shipped essay, in nats a token; the base model's own in the base's record."""
        ids = self.tokenizer(unrelated_text(self.tokenizer, NEUTRAL_TOKENS))["input_ids"][:NEUTRAL_TOKENS]
        tokens = torch.tensor([ids], device=self.base.device)
        loss = model(input_ids=tokens, labels=tokens).loss
        return {"nats_a_token": float(loss)}

    @torch.inference_mode()
    def _decoding(self, model: PreTrainedModel | PeftModel) -> dict[str, float]:
        """Greedy tokens a second for 8 short rows, with the adapter and without, one behind the other."""
        rows = self.tokenizer(["The keeper of the light"] * 8, return_tensors="pt").to(self.base.device)

        def speed(of: Any) -> float:
            options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
            of.generate(**rows, **{**options, "max_new_tokens": 2, "min_new_tokens": 2})  # warm
            started = time.perf_counter()
            of.generate(**rows, **options)
            return round(8 * 16 / (time.perf_counter() - started), 1)

        if model is self.base:
            return {"tokens_a_second": speed(model)}
        with_adapter = speed(model)
        if not isinstance(model, PeftModel):
            return {"tokens_a_second": with_adapter, "base": speed(self.base)}
        with model.disable_adapter():
            return {"tokens_a_second": with_adapter, "base": speed(model)}


def _as_record(scored: Scored, scoring: str) -> dict[str, Any]:
    """A score with its points; a classifier's points are 0 and 100, and its answers are short enough to keep."""
    record: dict[str, Any] = {"score": round(scored.score, 4), "rows": len(scored.points), **scored.metrics}
    record["points"] = [round(point, 3) for point in scored.points]
    if scoring == "exact_match":
        record["answers"] = scored.answers
    return record
