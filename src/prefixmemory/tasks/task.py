"""A task: where its rows come from, how few of them train, and how answers are scored."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from prefixmemory.errors import PrefixMemoryError, check_choice, did_you_mean
from prefixmemory.files.names import check_name
from prefixmemory.files.yaml_files import Source, blamed_path, find_yaml, read_yaml, shipped, typed
from prefixmemory.rows.data import Data, read_rows, sample
from prefixmemory.rows.rendering import right_answer
from prefixmemory.rows.rows import FORMATS, OBJECTIVE_FORMATS, Row, labels_of, row_format
from prefixmemory.tasks.metrics import check_text_metrics
from prefixmemory.training.preferences import check_trl
from prefixmemory.training.settings import TrainingSettings

Scoring = Literal["exact_match", "number", "reading", "text", "loss", "preference"]
#: Which kinds of rows a scoring needs.
SCORED_ROWS: dict[str, tuple[str, ...]] = {
    "exact_match": ("text", "prompt", "instruction"),
    "number": ("prompt", "instruction"),
    "reading": ("prompt", "instruction"),
    "text": ("prompt", "instruction"),
    "loss": ("text", "prompt", "instruction", "messages"),
    "preference": ("preference",),
}
#: Of the training split, for validation, where training takes all there is.
VALIDATION_SHARE = 0.2


@dataclass(frozen=True)
class Task:
    """One task of a comparison.

    Rows come from the first of these that is there: ``folder`` below the suite's data folder, the files ``train`` and
    ``test`` beside the task's own YAML file, the Hub's data set ``hub``.

    Args:
        name: how suites call it.
        version: raised whenever scores of before and after are not comparable.
        description: one line.
        licence: of the data.
        scoring: ``exact_match`` of the first line that the model writes, ``number`` (the last number), ``reading``
            (exact match and F1 of SQuAD), ``text`` (BLEU and ROUGE), ``loss`` (nats per token), ``preference`` (which
            answer of a pair the model prefers; ``training`` then names the objective).
        folder: ``train.jsonl`` and ``test.jsonl`` lie there.
        train, test: files, relative to the task's YAML file.
        hub: id of the data set on the Hub.
        hub_subset: its subset.
        hub_splits: names of its training and test splits.
        hub_columns: our field -> its column, as in :class:`~prefixmemory.rows.data.Data`.
        hub_where: keep the rows whose columns have these values.
        columns: our field -> column of the files.
        where: keep the rows of the files whose fields have these values.
        labels: keep this many labels of the training split, in alphabetical order.
        first_label: from this one on, counted from 0.
        longest_text: keep rows of at most this many characters, prompt and answer.
        per_label: training rows of each label, drawn with the run's seed.
        limit: training rows in all, drawn with the run's seed.
        max_new_tokens: longest answer; ``None``: as long as the longest right one, and room for a short text where
            answers are no labels.
        transfers_to: tasks of other data on which the trained adapter is scored, too.
        training: settings that suit the task, over the suite's.
        changelog: a line a version.
    """

    name: str
    version: int
    description: str
    licence: str
    scoring: Scoring = "exact_match"
    folder: str | None = None
    train: str | None = None
    test: str | None = None
    hub: str | None = None
    hub_subset: str | None = None
    hub_splits: tuple[str, str] = ("train", "test")
    hub_columns: dict[str, str] | None = None
    hub_where: dict[str, str] = field(default_factory=dict)
    columns: dict[str, str] | None = None
    where: dict[str, str] = field(default_factory=dict)
    labels: int | None = None
    first_label: int = 0
    longest_text: int | None = None
    per_label: int | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    transfers_to: list[str] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    changelog: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_name("name", self.name)
        check_choice("scoring", self.scoring, get_args(Scoring))
        for name in ("labels", "longest_text", "per_label", "limit", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PrefixMemoryError(f"{name}={value} is out of range: give a number above 0.")
        if self.first_label < 0:
            raise PrefixMemoryError(f"first_label={self.first_label} is out of range: give a number from 0 on.")
        if (self.train is None) != (self.test is None):
            raise PrefixMemoryError(f"{'train' if self.train is None else 'test'} is missing: give both files.")
        if self.folder is None and self.train is None and self.hub is None:
            raise PrefixMemoryError("train is missing: give train and test, or folder, or hub: where the rows are.")
        if self.scoring == "preference" and OBJECTIVE_FORMATS[self.settings().objective] == OBJECTIVE_FORMATS["sft"]:
            raise PrefixMemoryError(
                "training is without objective: scoring='preference' needs dpo, simpo or kto, which defines the reward."
            )

    def settings(self) -> TrainingSettings:
        """The settings that the task itself asks for, over the defaults."""
        return TrainingSettings(**self.training)

    def check_installed(self) -> None:
        """Refuse a task that needs packages which are not installed, for scoring or for training."""
        if self.scoring == "text":
            check_text_metrics()
        if self.settings().objective != "sft":
            check_trl(self.settings().objective)

    def rows(self, data: Path | None, split: Literal["train", "test"]) -> list[Row]:
        """All rows of a split that the task keeps.

        Args:
            data: folder that holds ``folder``; ``None``: files of the task's own, or the Hub.
            split: ``train`` or ``test``.

        Raises:
            PrefixMemoryError: nothing can be read, no row is kept, or rows are of a kind that cannot be scored so.
        """
        local = None if data is None or self.folder is None else data / self.folder
        file = self.train if split == "train" else self.test
        there = [] if local is None else [name for name in ("train", "test") if (local / f"{name}.jsonl").is_file()]
        if len(there) == 1:  # the other split would come from elsewhere
            raise PrefixMemoryError(f"Task {self.name}: {local} has {there[0]}.jsonl alone. Give both files.")
        if local is not None and there:
            rows, where = read_rows(local / f"{split}.jsonl", self.columns), self.where
        elif file is not None:
            rows, where = read_rows(file, self.columns), self.where
        elif self.hub is not None:
            rows = read_rows(self.hub, self.hub_columns, self.hub_splits[split == "test"], self.hub_subset)
            where = self.hub_where
        else:
            raise PrefixMemoryError(
                f"Task {self.name}: {local or self.folder} does not exist. Give --data, the folder."
            )
        self._check_kind(rows)
        kept = self._kept(data, rows, where, split)
        if not kept:
            raise PrefixMemoryError(
                f"Task {self.name}: no row of the {split} split is left by where, first_label and longest_text."
            )
        return kept

    def _check_kind(self, rows: list[Row]) -> None:
        kind, possible = row_format(rows), SCORED_ROWS[self.scoring]
        found = f"{rows[0].where} is of the kind {kind}."
        if kind not in possible:
            wanted = " or ".join(possible)
            raise PrefixMemoryError(
                f"Task {self.name}: scoring={self.scoring!r} needs rows of the kind {wanted}; {found}"
            )
        several = (row for row in rows if len(right_answer(row).splitlines()) > 1)
        if self.scoring == "exact_match" and (row := next(several, None)) is not None:
            raise PrefixMemoryError(
                f"Task {self.name}: {row.where} has an answer of several lines, and scoring='exact_match' compares the "
                "first line that the model writes. Use 'text' or 'loss'."
            )
        for name in ("labels", "first_label", "per_label"):
            if getattr(self, name) and kind != "text":
                raise PrefixMemoryError(f"Task {self.name}: {name} needs rows with 'text' and 'label'; {found}")

    def _kept(self, data: Path | None, rows: list[Row], where: Mapping[str, str], split: str) -> list[Row]:
        for name, value in where.items():
            values = {str(row[name]) for row in rows if name in row}
            if not values:
                hint = did_you_mean(name, rows[0])
                raise PrefixMemoryError(f"Task {self.name}: where names {name!r}, which no row has.{hint}")
            if value not in values:
                hint = did_you_mean(value, values)
                raise PrefixMemoryError(f"Task {self.name}: where asks for {name}={value!r}, which no row has.{hint}")
        rows = [row for row in rows if all(str(row.get(name)) == value for name, value in where.items())]
        if self.labels is not None or self.first_label:
            whole = replace(self, labels=None, first_label=0, longest_text=None)
            known = labels_of(rows if split == "train" else whole.rows(data, "train"))  # a test split may lack some
            labels = known[self.first_label :][: self.labels]
            rows = [row for row in rows if row["label"] in labels]
        if self.longest_text is not None:
            rows = [row for row in rows if _characters(row) <= self.longest_text]
        return rows

    def split(self, data: Path | None, validation: int, test: int, seed: int) -> Split:
        """What one run uses: the same validation and test rows whatever the seed, which draws the training rows.

        Validation rows come out of the training split, are never trained on, and take no row that training asks for:
        they are at most what ``per_label`` (of each label) or ``limit`` leaves, and where training takes all there
        is, :data:`VALIDATION_SHARE` of the split.

        Args:
            data: as in :meth:`rows`.
            validation: rows for choosing a learning rate, where as many can be spared.
            test: rows for the score.
            seed: of the run.

        Raises:
            PrefixMemoryError: no row can be spared for validation.
        """
        everything, tested = self.rows(data, "train"), self.rows(data, "test")
        held_out = self._validation(everything, validation)
        chosen = {id(row) for row in held_out}
        train = sample([row for row in everything if id(row) not in chosen], self.per_label, self.limit, seed)
        unseen = [row for row in held_out if row not in train]  # a file may hold a row twice
        if held_out and not unseen:
            raise PrefixMemoryError(f"Task {self.name}: its validation rows are all among its training rows, too.")
        return Split(train, unseen, sample_rows(tested, test, "test"))

    def _validation(self, rows: list[Row], wanted: int) -> list[Row]:
        spare = self._spare(rows)
        count = min(wanted, spare.total())
        drawn = sample_rows(rows, count, "validation")
        of_them = {id(row) for row in drawn}
        others = (row for row in rows if id(row) not in of_them)  # in the place of what a label cannot spare
        found: list[Row] = []
        for row in (*drawn, *others):
            label = "" if self.per_label is None else row["label"]
            if len(found) < count and spare[label] > 0:
                spare[label] -= 1
                found.append(row)
        if wanted and not found:
            raise PrefixMemoryError(
                f"Task {self.name}: it has {len(rows)} training rows and trains on all of them, which leaves none for "
                "validation. Lower per_label or limit, or give more rows."
            )
        return found

    def _spare(self, rows: list[Row]) -> Counter[str]:
        """How many rows of each label training leaves; of all rows together where it does not ask by label."""
        if self.per_label is not None:
            labels = Counter(row["label"] for row in rows)
            return Counter({label: max(count - self.per_label, 0) for label, count in labels.items()})
        takes_all = self.limit is None or self.limit >= len(rows)
        share = max(int(len(rows) * VALIDATION_SHARE), min(len(rows) - 1, 1))  # one of few rows, but not the only one
        return Counter({"": share if takes_all else len(rows) - (self.limit or 0)})


@dataclass(frozen=True)
class Split:
    """Rows of one run."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]


def sample_rows(rows: list[Row], count: int, name: str) -> list[Row]:
    """``count`` rows (all, if there are no more), always the same for the same ``name``, in the order of the file."""
    if len(rows) <= count:
        return rows
    chosen = random.Random(name).sample(range(len(rows)), count)
    return [rows[index] for index in sorted(chosen)]


def _characters(row: Row) -> int:
    """Of what the model reads and writes; a row may have other columns."""
    kind = row_format([row])
    if kind == "messages":
        return sum(len(message.get("content") or "") for message in row["messages"])
    read = [row[name] for name in FORMATS[kind] if isinstance(row[name], str)]
    return sum(map(len, read)) + len((row.get("input") or "") if kind == "instruction" else "")


def shipped_tasks() -> list[str]:
    """Names of the tasks that ship with the package."""
    return list(shipped("tasks"))


def load_task(name: str, changes: Mapping[str, Any] | None = None, beside: Path | None = None) -> Task:
    """The shipped task ``name``, or the one in a YAML file.

    Args:
        name: a shipped task, or the path of a ``.yaml`` file.
        changes: fields to change, as a suite may.
        beside: folder to which a path is relative; default: the current one.

    Raises:
        PrefixMemoryError: no such task, or its file is wrong; the message names line and field.
    """
    return _read(find_yaml(name, "tasks", "task", beside), changes)


def _read(file: Path, changes: Mapping[str, Any] | None) -> Task:
    content, lines = read_yaml(file, "task: Give a YAML file with name, train, test.", "a task is a mapping")
    changed = {name: f"{name}, which the suite changes" for name in changes or {}}
    source = Source(file, lines, changed)
    written = {**content, **(changes or {})}
    if isinstance(written.get("training"), Mapping):
        _check_training(written["training"], source)
    task = typed(Task, written, source, "a task")
    if task.train is not None and task.test is not None:
        task = replace(task, train=str(file.parent / task.train), test=str(file.parent / task.test))
    for name in ("columns", "hub_columns"):
        _check_columns(name, getattr(task, name), source)
    return task


def _check_training(training: Mapping[str, Any], source: Source) -> None:
    for name in ("learning_rate", "seed"):
        if name in training:
            raise source.error(f"training.{name}", f"training.{name} is what the protocol sets. Leave it out.")
    typed(TrainingSettings, training, source, "training", "training")


def _check_columns(name: str, columns: Mapping[str, str] | None, source: Source) -> None:
    try:
        Data(train="", columns=None if columns is None else dict(columns))
    except PrefixMemoryError as error:
        message = f"{name}{str(error).removeprefix('columns')}"
        raise source.error(blamed_path("", message), message) from None
