"""One run: train (or find the trained weights), score, and say everything about it in one record."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from prefixmemory.compare.method import Method
from prefixmemory.compare.models import Models
from prefixmemory.compare.records import Decoding, Failure, Provenance, Record, Run, Scores
from prefixmemory.compare.runs import writes_answers
from prefixmemory.compare.store import Store
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.files.records import provenance, write_json
from prefixmemory.models.loading import full_name
from prefixmemory.rows.encoding import behind
from prefixmemory.rows.rendering import render
from prefixmemory.rows.rows import Row, kind_of, with_one_answer
from prefixmemory.rows.unrelated_text import unrelated_text
from prefixmemory.scoring.generation import answers
from prefixmemory.tasks import Task
from prefixmemory.tasks.outputs import alpaca_eval, prompts
from prefixmemory.tasks.scoring import room_for_answers, score
from prefixmemory.tasks.task import sample_rows
from prefixmemory.training.interrupt import Interrupted
from prefixmemory.training.settings import TrainingSettings
from prefixmemory.tuner.activation import activation, unfinished_text

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
        self.models = Models(self.suite)
        self.made_with = Provenance(**provenance())  # of the code that is running, whatever is edited meanwhile

    def load(self, records: Iterable[Record] = ()) -> None:
        """Load tokenizer and base model, if that has not been done.

        Args:
            records: those that stand already.

        Raises:
            PrefixMemoryError: they cannot be loaded, or a record was made with other weights of that name.
        """
        _ = self.models.tokenizer
        ours = self.models.fingerprint
        if any(one.base_fingerprint not in (None, ours) for one in records):
            raise PrefixMemoryError(
                f"{self.store.folder} holds records of other weights of {self.suite.model} than were loaded now: "
                "methods would be compared on two base models. Give another --output, or the weights of then."
            )

    def run(self, run: Run) -> Record:
        """The record of ``run``; a run that fails has an ``error`` in the place of its scores."""
        method, task = self.loaded.methods[run.method], self.loaded.tasks[run.task]
        weights = full_name(self.suite.model)
        record = Record(
            key=self.store.key(run),
            run=run,
            suite=self.suite.name,
            base_model=self.suite.model,
            kind=method.kind,
            made_with=self.made_with,
            # a folder or file without its place on this machine
            base_weights=Path(weights).name if Path(weights).exists() else weights,
            base_fingerprint=self.models.fingerprint,
        )
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            record = self._run(record, task, method)
        except (Interrupted, BrokenPipeError):  # whoever reads the lines is gone: no fault of this run
            raise KeyboardInterrupt from None
        except Exception as error:  # whatever it is, the others go on, and the record tells
            text = " ".join(str(error).split())[:500]
            record = replace(record, error=Failure(type(error).__name__, text))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if torch.cuda.is_available():
            record = replace(record, peak_memory_bytes=torch.cuda.max_memory_allocated())
        return record

    def _run(self, record: Record, task: Task, method: Method) -> Record:
        run = record.run
        split = task.split(self.data, self.suite.validation_rows, self.suite.test_rows, run.seed)
        shots = self.examples(task, split.train, method.shots) if method.shots else ""
        settings = self.loaded.settings(task, method, run.learning_rate or 1.0, run.seed)
        folder = self.store.adapter(run)
        with self.models.trained(method, split.train, settings, folder) as (model, training), self._scoring(model):
            record = replace(record, training=training)
            if run.stage == "rate":
                return replace(record, validation=self._score(model, task, split.validation, shots, settings))
            test = self._score(model, task, split.test, shots, settings)
            record = replace(record, test=test)
            if not run.chosen:
                return record
            long_input = {}
            behind = sample_rows(split.test, self.suite.long_input_rows, "long input")
            for tokens in sorted(self.suite.long_input):
                text = unrelated_text(self.models.tokenizer, tokens)
                long_input[str(tokens)] = self._score(model, task, behind, shots, settings, text)
            if self.suite.long_input:  # the same rows without the text before them
                same = behind is split.test
                long_input["0"] = test if same else self._score(model, task, behind, shots, settings)
            others = task.transfers_to if self.suite.transfer_rows else ()
            transfer = {other: self._transfer(model, self.loaded.task(other)) for other in others}
            if writes_answers(self.loaded, task):
                self._write_answers(run, model, task, split.test, shots)
            return replace(
                record,
                long_input=long_input,
                transfer=transfer,
                neutral_text=self._neutral(model),
                decoding=self._decoding(model),
            )

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
            label = row["label"] if kind_of(row) == "text" else ""
            counts[label] = counts.get(label, 0) + 1
            if counts[label] <= shots:
                chosen.append(row)
        if task.scoring == "preference":
            chosen = with_one_answer(chosen)[::2]  # the better answer
        tokenizer, found = self.models.tokenizer, ""
        for example in render(chosen, tokenizer):
            answer = example.completion.removesuffix(str(tokenizer.eos_token))
            found = f"{behind(found, example.prompt, tokenizer)}{answer}\n\n"
        return found

    def _score(
        self,
        model: PreTrainedModel | PeftModel,
        task: Task,
        rows: list[Row],
        shots: str,
        settings: TrainingSettings | None = None,
        front: str = "",
    ) -> Scores:
        """``shots`` are rendered examples, whose answers end without the end token, so that it is not asked for: a
        longer answer that begins with the right one is right. ``front`` is text before them."""
        length = room_for_answers(task, rows, self.models.tokenizer)
        context, end = behind(front, shots, self.models.tokenizer), "" if shots else None
        scored = score(model, self.models.tokenizer, task, rows, context, length, settings=settings, end=end)
        said = scored.answers if task.scoring == "exact_match" else []  # short enough to keep
        points = [round(point, 3) for point in scored.points]
        return Scores(round(scored.score, 4), points, scored.metrics, said, scored.greedy)

    def _transfer(self, model: PreTrainedModel | PeftModel, other: Task) -> Scores:
        """Another task's test rows, with one of its examples a label in the prompt: what is left of the base model."""
        split = other.split(self.data, self.suite.validation_rows, self.suite.transfer_rows, self.suite.seeds[0])
        return self._score(model, other, split.test, self.examples(other, split.train, 1))

    def _write_answers(
        self, run: Run, model: PreTrainedModel | PeftModel, task: Task, rows: list[Row], context: str
    ) -> None:
        """Leave answers to some test rows as AlpacaEval reads them, for users who have a judge."""
        rows = sample_rows(rows, self.suite.written_answers, "answers")
        length = task.max_new_tokens or LONGEST_ANSWER
        asked = prompts(rows, self.models.tokenizer)
        said = answers(model, self.models.tokenizer, asked, length, context=context, one_line=False)
        write_json(self.store.outputs(run), alpaca_eval(rows, said, f"{run.method}, seed {run.seed}", task.name))

    @torch.inference_mode()
    def _neutral(self, model: PreTrainedModel | PeftModel) -> float:
        """Negative log-likelihood of the shipped essay in nats per token; the base model's is in the base's record.

        A memory that waits for its invocation does not speak here.
        """
        ids = self.models.tokenizer(unrelated_text(self.models.tokenizer, NEUTRAL_TOKENS))["input_ids"][:NEUTRAL_TOKENS]
        tokens = torch.tensor([ids], device=self.models.base.device)
        with unfinished_text():
            return float(model(input_ids=tokens, labels=tokens).loss)

    @torch.inference_mode()
    def _decoding(self, model: PreTrainedModel | PeftModel) -> Decoding:
        """Greedy tokens per second for 8 short rows, with the adapter and without, one behind the other.

        A memory that waits for an invocation speaks on all tokens here: there is none in them.
        """
        rows = self.models.tokenizer(["The keeper of the light"] * 8, return_tensors="pt").to(self.models.base.device)

        config = model.active_peft_config if isinstance(model, PeftModel) else None
        waits = getattr(config, "active_from", "start") != "start"

        def speed(of: Any) -> float:
            options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
            with activation([0] * 8) if waits else nullcontext():
                of.generate(**rows, **{**options, "max_new_tokens": 2, "min_new_tokens": 2})  # warm
                started = time.perf_counter()
                of.generate(**rows, **options)
            return round(8 * 16 / (time.perf_counter() - started), 1)

        if model is self.models.base:
            return Decoding(speed(model))
        with_adapter = speed(model)
        if not isinstance(model, PeftModel):
            return Decoding(with_adapter, speed(self.models.base))
        with model.disable_adapter():
            return Decoding(with_adapter, speed(model))
