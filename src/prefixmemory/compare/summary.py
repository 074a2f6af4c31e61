"""What the report of a comparison shows, as data; the file ``NAME.json`` holds the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefixmemory.compare.method import Kind
from prefixmemory.files.records import without_nan, write_json


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and rows with its 95 % interval; ``None``: there is none."""

    mean: float | None
    low: float | None
    high: float | None

    def parts(self) -> dict[str, float | None]:
        """Its fields, for what is an estimate and more."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


def digits_of(scoring: str) -> int:
    """How many of a score are shown behind the point: nats differ by hundredths."""
    return 3 if scoring == "loss" else 1


@dataclass(frozen=True)
class TaskInfo:
    """A task of the suite; ``rows``: of its test; ``averaged``: averages over tasks hold it."""

    name: str
    version: int
    description: str
    licence: str
    scoring: str
    unit: str
    rows: int | None
    averaged: bool

    @property
    def digits(self) -> int:
        """Those of a score."""
        return digits_of(self.scoring)


@dataclass(frozen=True)
class MethodInfo:
    """A method of the suite."""

    name: str
    kind: Kind
    description: str


@dataclass(frozen=True)
class Behind(Estimate):
    """The score behind unrelated text, and its change against the same ``rows`` behind nothing."""

    change: Estimate
    rows: int


@dataclass(frozen=True)
class Elsewhere(Estimate):
    """The score on another task."""

    rows: int
    unit: str


@dataclass(frozen=True)
class Cell(Estimate):
    """One task and method.

    Attributes:
        seeds, scores: those that have a score, in order.
        planned_seeds: how many the suite asks for.
        worst: score of the worst seed.
        collapsed: runs below the untrained model; ``None`` where it has no score.
        rows: of the test.
        metrics: further figures by name.
        long_input: tokens before the rows -> score.
        transfer: other task -> score.
        neutral_text: the essay's nats per token.
    """

    task: str
    method: str
    learning_rate: float | None
    seeds: list[int]
    planned_seeds: int
    scores: list[float]
    worst: float
    collapsed: int | None
    rows: int
    metrics: dict[str, float]
    long_input: dict[str, Behind]
    transfer: dict[str, Elsewhere]
    neutral_text: float | None


@dataclass(frozen=True)
class RatePoint:
    """One task, method and learning rate.

    Attributes:
        factor: the rate over the method's own.
        chosen: by the validation rows.
        validation: their score.
        seeds, tests: test scores of the seeds that were run, and ``test``, their mean.
        below_base: how many are below the untrained model.
        failed: runs.
    """

    task: str
    method: str
    learning_rate: float
    factor: float
    chosen: bool
    validation: float | None
    seeds: list[int]
    tests: list[float]
    test: float | None
    below_base: int | None
    failed: int


@dataclass(frozen=True)
class Robustness:
    """A method whose every rate was tested with every seed: mean by rate, and how far the worst is from the best."""

    method: str
    factors: list[float]
    means: list[float]
    worst_against_best: float
    by_task: dict[str, float]
    below_base: int | None
    runs: int


@dataclass(frozen=True)
class Transferred(Estimate):
    """Mean over other tasks, and over the own tasks of the same adapters; ``pairs`` of an own and another task."""

    own: Estimate
    pairs: int


@dataclass(frozen=True)
class Average(Estimate):
    """One method over tasks; fields as those of a :class:`Cell`."""

    method: str
    worst: float
    collapsed: int | None
    runs: int
    tasks: int
    long_input: dict[str, Behind]
    transfer: Transferred | None
    neutral_text: float | None
    trainable_parameters: int


@dataclass(frozen=True)
class Incomplete:
    """A method without a score for some run."""

    method: str
    scored: int
    runs: int


@dataclass(frozen=True)
class OnTask(Estimate):
    """A difference on one task, over ``seeds``."""

    seeds: list[int]


@dataclass(frozen=True)
class Difference(Estimate):
    """Method ``a`` minus method ``b``, on average over ``tasks``, and by task."""

    a: str
    b: str
    tasks: list[str]
    by_task: dict[str, OnTask]


@dataclass(frozen=True)
class Cost:
    """What a method costs, over its final runs at the chosen rates.

    Attributes:
        rows_a_second: of training.
        decoding: speed of writing over the base model's.
        peak_memory_bytes: on the GPU.
    """

    method: str
    runs: int
    trainable_parameters: int
    file_bytes: int
    train_seconds: float | None
    rows_a_second: float | None
    decoding: float | None
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class FailedRun:
    """A run that failed, and why."""

    task: str
    method: str
    stage: str
    seed: int
    rate: float | None
    type: str
    message: str


@dataclass(frozen=True)
class MissingRuns:
    """``runs`` of a task and method that have no record, and why."""

    task: str
    method: str
    runs: int
    why: str


@dataclass(frozen=True)
class Summary:
    """Everything that the report shows.

    Attributes:
        conditions: what all runs have in common, and what they were made with, by name.
        notes: what a reader must know before comparing these figures.
        averages: of methods whose every run has a score; ``incomplete`` are the others.
        differences: of every ordered pair of methods.
    """

    conditions: dict[str, Any]
    notes: list[str]
    tasks: list[TaskInfo]
    methods: list[MethodInfo]
    cells: list[Cell]
    rates: list[RatePoint]
    robustness: list[Robustness]
    averages: list[Average]
    incomplete: list[Incomplete]
    differences: list[Difference]
    costs: list[Cost]
    failed: list[FailedRun]
    missing: list[MissingRuns]

    @property
    def digits(self) -> int:
        """Those of averages over tasks."""
        return min((task.digits for task in self.tasks if task.averaged), default=1)

    def plain(self) -> dict[str, Any]:
        """As JSON has it, with ``None`` for what is no number."""
        plain: dict[str, Any] = without_nan(asdict(self))
        return plain

    def write(self, file: Path) -> None:
        """Write it as JSON."""
        write_json(file, self.plain())
