"""``prefixmemory evaluate``: an adapter beside its base model, on your rows or on lm-evaluation-harness."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from prefixmemory.adapters.loading import Adapter, read_record
from prefixmemory.errors import PrefixMemoryError, did_you_mean
from prefixmemory.files.locks import Lock
from prefixmemory.files.records import RECORD, provenance, write_json
from prefixmemory.progress import progress_bar
from prefixmemory.rows.data import read_rows
from prefixmemory.rows.encoding import begins, tokenize
from prefixmemory.rows.rendering import Example, render
from prefixmemory.rows.rows import FORMATS, OBJECTIVE_FORMATS, Row, Rows, checked, row_format
from prefixmemory.scoring.generation import (
    Progress,
    accuracy,
    answers,
    invocation_in,
    longest_answer,
    most_tokens,
    room_for_answer,
)
from prefixmemory.scoring.likelihood import likelihoods, nats_a_token
from prefixmemory.training.card import write_model_card
from prefixmemory.training.record import checksum
from prefixmemory.tuner.activation import activation
from prefixmemory.tuner.layers import memory_layers

#: Rows whose answer is a label: their answers are compared, word for word.
COMPARED = ("text",)


@dataclass
class Scores:
    """Figures of an adapter and of its base model.

    Attributes:
        conditions: what was scored: data or task, number of rows.
        metrics: name -> (base model, adapter).
        details: one entry per row, or what the harness returned.
        rows: checksum of the rows; files in two folders may have one name.
    """

    conditions: dict[str, Any]
    metrics: dict[str, tuple[float, float]]
    details: list[Any] = field(default_factory=list)
    rows: str = ""

    def shown(self) -> str:
        """The figures as a table for a terminal."""
        width = max(len(name) for name in self.metrics) + 2
        head = ", ".join(f"{name} {value}" for name, value in self.conditions.items())
        lines = [head, f"{'':{width}}{'base model':>12}{'adapter':>12}"]
        lines += [f"{name:{width}}{base:12.4g}{ours:12.4g}" for name, (base, ours) in self.metrics.items()]
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """Everything, with commit, versions and hardware."""
        metrics = {name: {"base model": base, "adapter": ours} for name, (base, ours) in self.metrics.items()}
        return {**self.conditions, "metrics": metrics, "details": self.details, **provenance()}


def rows_to_score(record: Mapping[str, Any], source: str, split: str) -> list[Row]:
    """The rows of ``source``, read as an adapter's training rows were: with the ``columns`` of its run record.

    A file that lacks these columns may have our names instead.

    Raises:
        PrefixMemoryError: nothing can be read there, a row is bad, or rows are of a kind that has no one answer.
    """
    data = record.get("data")
    trained = data if isinstance(data, Mapping) else {}
    subset = trained.get("subset") if source == trained.get("train") else None
    columns = trained.get("columns")
    if not isinstance(columns, Mapping) or not all(isinstance(name, str) for name in columns.values()):
        columns = None  # nothing that a run wrote
    rows = read_rows(source, columns, split, subset, or_ours=True)
    check_scorable(rows)
    return rows


def check_scorable(rows: Rows) -> None:
    """Refuse rows that do not say what the answer should be."""
    kind = row_format(rows)
    if kind not in OBJECTIVE_FORMATS["sft"]:
        wanted = " or ".join(str(list(FORMATS[name])) for name in OBJECTIVE_FORMATS["sft"])
        raise PrefixMemoryError(
            f"{getattr(rows[0], 'where', 'The data')}: has {list(FORMATS[kind])}, which name no one right answer. To "
            f"evaluate, give rows with {wanted}."
        )


@torch.inference_mode()
def refuse_untrained(adapter: Adapter) -> None:
    """Refuse an adapter that changes nothing: its scores would be those of the base model.

    Raises:
        PrefixMemoryError: its logits equal the base model's.
    """
    text = adapter.tokenizer("The quick brown fox jumps over the lazy dog.")["input_ids"]
    ids = torch.tensor([(invocation_in(adapter.model) or []) + text])  # PEFT's activated LoRA waits for it
    ids = ids.to(adapter.model.device)
    with adapter.model.disable_adapter():
        base = adapter.model(input_ids=ids).logits
    with activation([0]):  # also where it would wait for its invocation
        ours = adapter.model(input_ids=ids).logits
    if not torch.isfinite(ours).all():
        raise PrefixMemoryError(
            f"The adapter {adapter.name} answers with infinities or NaN: its training diverged. Train it again with a "
            "lower learning rate."
        )
    if torch.equal(base, ours):
        raise PrefixMemoryError(
            f"The adapter {adapter.name} changes nothing: its logits equal the base model's, bit for bit. Was it "
            "trained, and is its scale above 0? Its scores would be the base model's, so none are reported."
        )


def evaluate_rows(
    adapter: Adapter, rows: Rows, source: str, batch_size: int, max_new_tokens: int, console: Console
) -> Scores:
    """Likelihood of the rows' completions; for rows with labels, accuracy by exact match of the generated label.

    Answers have at most ``max_new_tokens`` tokens, or as many as the longest label.
    """
    rows = checked(rows)
    check_scorable(rows)
    model, tokenizer = adapter.model, adapter.tokenizer
    examples = render(rows, tokenizer)
    silent = uninvoked(adapter, examples)
    compared = row_format(rows) in COMPARED
    room_for_answer(model, 0, max_new_tokens)
    length = (
        max(max_new_tokens, longest_answer((row["label"] for row in rows), tokenizer)) if compared else max_new_tokens
    )
    passes = 2 * len(rows) * (2 if compared else 1)
    metrics: dict[str, list[float]] = {}
    found: list[list[str]] = []
    with progress_bar(console) as bar:
        task = bar.add_task("evaluating", total=passes)

        def advance(count: int) -> None:
            bar.advance(task, count)

        for with_adapter in (False, True):
            with _switched(adapter, with_adapter):
                likely = likelihoods(model, tokenizer, examples, batch_size, progress=advance)
                loss = nats_a_token(likely)
                metrics.setdefault("loss (nats a token)", []).append(loss)
                metrics.setdefault("perplexity", []).append(math.exp(min(loss, 700.0)))
                if compared:
                    prompts = [example.prompt for example in examples]
                    said = answers(model, tokenizer, prompts, length, batch_size, progress=advance)
                    metrics.setdefault("accuracy (%)", []).append(accuracy(said, [row["label"] for row in rows]))
                    found.append(said)
    details = [
        {"text": row["text"], "label": row["label"], "base model": base, "adapter": ours}
        for row, base, ours in (zip(rows, *found, strict=True) if compared else ())
    ]
    conditions: dict[str, Any] = {"data": source, "rows": len(rows)}
    if cut := sum(one.cut for one in likely):
        conditions["rows whose prompt lost its beginning"] = cut
    if silent:
        conditions["rows without the invocation, in which the base model answers"] = silent
    return Scores(conditions, {name: (base, ours) for name, (base, ours) in metrics.items()}, details, checksum(rows))


def uninvoked(adapter: Adapter, examples: Sequence[Example]) -> int:
    """How many examples have no invocation, where the adapter waits for one: the base model answers there.

    Raises:
        PrefixMemoryError: all of them.
    """
    invocation = invocation_in(adapter.model)
    if invocation is None:
        return 0
    read = tokenize(examples, adapter.tokenizer, most_tokens(adapter.model), invocation=invocation)
    silent = sum(begins(one.prompt + one.completion, invocation) is None for one in read)
    if silent == len(read):
        raise PrefixMemoryError(
            f"No row has the tokens {invocation}, from which on {adapter.name} speaks: its scores would be the base "
            "model's. Give rows of the kind that it was trained on."
        )
    return silent


def _switched(adapter: Adapter, on: bool) -> AbstractContextManager[Any]:
    return nullcontext() if on else adapter.model.disable_adapter()


def completion_loss(adapter: Adapter, examples: list[Example], batch_size: int, progress: Progress) -> float:
    """Mean negative log-likelihood of the completions' tokens, in nats."""
    return nats_a_token(likelihoods(adapter.model, adapter.tokenizer, examples, batch_size, progress=progress))


def evaluate_harness(
    adapter: Adapter, tasks: Sequence[str], include_path: Path | None, limit: int | None, batch_size: int
) -> Scores:
    """Scores on tasks of lm-evaluation-harness.

    Raises:
        PrefixMemoryError: the harness is not installed, does not know a task, or cannot load its data.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise PrefixMemoryError(
            "--tasks needs lm-evaluation-harness, which is not installed: pip install 'prefixmemory[eval]'."
        ) from error

    if include_path is not None and not include_path.is_dir():
        raise PrefixMemoryError(f"include_path={include_path} is no folder. Give one that holds tasks of your own.")
    manager = TaskManager(include_path=include_path and str(include_path), include_defaults=include_path is None)
    if include_path is not None and not set(tasks) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=str(include_path))  # reads thousands of files
    for task in tasks:
        if task not in manager.all_tasks:
            raise PrefixMemoryError(
                f"lm-evaluation-harness has no task {task!r}.{did_you_mean(task, manager.all_tasks)} "
                "--include-path gives a folder with tasks of your own."
            )
    model = HFLM(pretrained=adapter.model, tokenizer=adapter.tokenizer, batch_size=batch_size)
    results = []
    how = {"tasks": list(tasks), "limit": limit, "task_manager": manager, "bootstrap_iters": 0}
    for with_adapter in (False, True):
        with _switched(adapter, with_adapter):
            try:
                results.append(simple_evaluate(model=model, **how))
            except OSError as error:  # datasets' errors, too
                raise PrefixMemoryError(
                    f"The data of {','.join(tasks)} cannot be loaded: {str(error).splitlines()[0].rstrip('.')}. Check "
                    "the network, or data_files in the task's YAML file."
                ) from error
    metrics = {}
    for task, figures in results[1]["results"].items():
        for name, value in figures.items():
            metric = name.removesuffix(",none")
            if isinstance(value, int | float) and "stderr" not in name and name not in ("alias", "sample_len"):
                metrics[f"{task}: {metric}"] = (float(results[0]["results"][task][name]), float(value))
    versions = {task: str(version) for task, version in results[1]["versions"].items()}
    conditions: dict[str, Any] = {"tasks": ",".join(tasks), "limit": limit or "none"}
    if any(layer.listener is not None and layer.listener.missed for layer in memory_layers(adapter.model)):
        if all(base == ours for base, ours in metrics.values()):
            raise PrefixMemoryError(
                f"The prompts of {','.join(tasks)} lack the tokens {invocation_in(adapter.model)}, from which on "
                f"{adapter.name} speaks: its scores would be the base model's. Train one with active_from='start'."
            )
        conditions["prompts without the invocation, in which the base model answers"] = "some"
    return Scores(conditions, metrics, [{"task versions": versions}])


def save_metrics(adapter: Adapter, scores: Scores) -> None:
    """Add the figures to the adapter's ``run.json`` and to its model card, beside what others have added meanwhile.

    Raises:
        PrefixMemoryError: another run lies there now.
    """
    # the card is public: the name of a data file, without the folders of this machine
    shown = {name: _without_folders(value) if name == "data" else value for name, value in scores.conditions.items()}
    if scores.rows:
        shown["checksum"] = scores.rows[:8]
    conditions = ", ".join(f"{name}: {value}" for name, value in shown.items())
    found = {
        f"{name}, {conditions}": {"value": ours, "base model": base} for name, (base, ours) in scores.metrics.items()
    }
    with Lock(adapter.folder / f".{RECORD}.lock").held(f"Another evaluation saves its figures in {adapter.folder}"):
        present = read_record(adapter.folder)
        if _of_run(present) != _of_run(adapter.record):
            raise PrefixMemoryError(
                f"{adapter.folder} holds another run than the one that was evaluated. Nothing was saved: evaluate it."
            )
        record = {**present, "metrics": {**present.get("metrics", {}), **found}}
        write_json(adapter.folder / RECORD, json.loads(json.dumps(record)))
        write_model_card(adapter.folder, record)


def _without_folders(data: str) -> str:
    """A file's name; that of a data set on the Hub whole."""
    return Path(data).name if Path(data).exists() else data


def _of_run(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "metrics"}
