"""What a run leaves behind: one record, and the one place that writes and reads records."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from prefixmemory.files.jsonl import append_line, damaged, read_lines

#: Name of the file of records in a comparison's folder.
RECORDS = "records.jsonl"
Stage = Literal["rate", "final"]
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Run:
    """One run of a suite.

    Attributes:
        task, method: names.
        stage: ``rate`` (scored on validation rows) or ``final`` (scored on test rows).
        learning_rate: ``None`` where nothing is trained.
        seed: of start values, order, and the choice of training rows.
        chosen: a ``final`` run at the chosen learning rate; others serve the curve over learning rates alone, and
            are not scored behind long inputs.
    """

    task: str
    method: str
    stage: Stage
    learning_rate: float | None
    seed: int
    chosen: bool = True
    __pydantic_config__ = _STRICT

    @property
    def training(self) -> tuple[str, str, float | None, int]:
        """What decides the trained weights: a ``rate`` run and a ``final`` one may share them."""
        return self.task, self.method, self.learning_rate, self.seed


@dataclass(frozen=True)
class Provenance:
    """What something was made with: commit of the checkout (``None``: there was none), versions, hardware, threads."""

    commit: str | None = None
    python: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str | None = None
    threads: int | None = None
    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Scores:
    """What a model reached on some rows.

    Attributes:
        score: the task's own figure; more is better.
        points: one per row.
        metrics: further figures by name, with their unit.
        answers: what a classifier wrote, one per row.
        greedy: of a loss: whether greedy decoding would write the right answer, one per row.
    """

    score: float
    points: list[float]
    metrics: dict[str, float] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)
    __pydantic_config__ = _STRICT

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.points)


@dataclass(frozen=True)
class Training:
    """How the weights of a run were trained.

    Attributes:
        settings: those of the training.
        trainable_parameters: how many numbers were trained.
        file_bytes: size of the weights on disk.
        rows: training rows.
        loss: mean over all steps.
        seconds: that training took.
        adapter: ``name`` of the PEFT method and the fields of its config; empty where every weight was trained.
        processes: that shared the steps.
        made_with: by what; adapters may be older than the scores.
    """

    settings: dict[str, Any]
    trainable_parameters: int
    file_bytes: int
    rows: int
    loss: float
    seconds: float
    adapter: dict[str, Any] = field(default_factory=dict)
    processes: int | None = None
    made_with: Provenance | None = None
    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Decoding:
    """Greedy tokens per second of the model, and of the base model in the same run."""

    tokens_a_second: float
    base: float | None = None
    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Failure:
    """Why a run has no score."""

    type: str
    message: str
    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Record:
    """Everything about one run.

    Attributes:
        key: stands for everything that decides the record (:func:`~prefixmemory.compare.runs.key`).
        run: which run it is.
        suite: the suite that it was made for.
        base_model: as the suite names it.
        attempt: 1, or more where it failed and was tried again.
        base_weights: file, folder or Hub id of the weights that were loaded.
        base_fingerprint: a sample of them (:func:`~prefixmemory.memories.checkpoint.fingerprint`).
        kind: of the method.
        made_with: what scored it.
        error: why it failed, in the place of all that follows.
        training: where something was trained.
        validation: scores of a ``rate`` run.
        test: scores of a ``final`` run.
        long_input: tokens of unrelated text before the rows -> scores, ``0`` being the same rows behind nothing.
        transfer: other task -> scores.
        neutral_text: negative log-likelihood of the shipped essay, in nats per token.
        decoding: speed of writing.
        peak_memory_bytes: on the GPU.
    """

    key: str
    run: Run
    suite: str
    base_model: str
    kind: str
    made_with: Provenance
    attempt: int = 1
    base_weights: str | None = None
    base_fingerprint: list[float | None] | None = None
    error: Failure | None = None
    training: Training | None = None
    validation: Scores | None = None
    test: Scores | None = None
    long_input: dict[str, Scores] = field(default_factory=dict)
    transfer: dict[str, Scores] = field(default_factory=dict)
    neutral_text: float | None = None
    decoding: Decoding | None = None
    peak_memory_bytes: int | None = None
    __pydantic_config__ = _STRICT

    @property
    def scores(self) -> Scores | None:
        """On validation rows or test rows, whichever its stage asks for."""
        return self.validation if self.run.stage == "rate" else self.test

    @property
    def failure(self) -> Failure | None:
        """What went wrong; a score that is no number is a failure, too."""
        if self.error is not None or self.scores is None:
            return self.error or Failure("NoScore", "it has no score")
        is_number = math.isfinite(self.scores.score)
        return None if is_number else Failure("NoNumber", f"its score is {self.scores.score}")


_RECORD = TypeAdapter(Record)


def write_record(file: Path, record: Record) -> None:
    """Add a record to ``file``; of several with one key the last counts."""
    append_line(file, _RECORD.dump_python(record, exclude_defaults=True))


def read_records(file: Path) -> Iterator[Record]:
    """The records in ``file``, in the order in which they were written; none if there is no such file.

    Raises:
        PrefixMemoryError: a line is damaged or holds no record; the message names file and line.
    """
    for number, content in read_lines(file):
        try:
            yield _RECORD.validate_python(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "it"
            raise damaged(file, number, f"{place}: {first['msg']}") from None
