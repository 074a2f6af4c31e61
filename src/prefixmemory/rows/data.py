"""Where rows come from, and which of them: files and data sets of the Hub, every row checked before it is used."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from prefixmemory.errors import PrefixMemoryError, did_you_mean
from prefixmemory.rows.conversations import as_messages
from prefixmemory.rows.readers import fields_of
from prefixmemory.rows.rows import EXPECTED, FORMATS, Row, check_row, check_same_format, kind_of


@dataclass(frozen=True)
class Data:
    """Where rows come from: the ``data:`` section of a recipe.

    Args:
        train: a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file, or the id of a data set of the Hub.
        validation: the same, for the validation loss; ``None``: there is none.
        subset: name of the subset (Hub: "configuration") of a Hub data set.
        train_split, validation_split: splits of a Hub data set.
        columns: our field -> their column, or a text with columns in braces: ``{prompt: "{context}\\n\\n{question}"}``.
        per_label: keep this many rows of each label (rows with ``text`` and ``label``), drawn with the run's seed.
        limit: keep this many rows, drawn with the run's seed; of the validation rows, too.
    """

    train: str
    validation: str | None = None
    subset: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    columns: dict[str, str] | None = None
    per_label: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("per_label", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PrefixMemoryError(f"{name}={value} is out of range: give a number above 0.")
        known = [*dict.fromkeys(name for names in FORMATS.values() for name in names), "input"]
        for ours, theirs in (self.columns or {}).items():
            if ours not in known:
                hint = did_you_mean(ours, known) or f" There are: {', '.join(known)}."
                raise PrefixMemoryError(f"columns.{ours} is no field of a row.{hint}")
            _template(ours, theirs)

    def training_rows(self, seed: int) -> list[Row]:
        """The rows to train on."""
        rows = read_rows(self.train, self.columns, self.train_split, self.subset)
        return sample(rows, self.per_label, self.limit, seed)

    def validation_rows(self, seed: int) -> list[Row]:
        """The rows for the validation loss; empty if there are none."""
        if self.validation is None:
            return []
        rows = read_rows(self.validation, self.columns, self.validation_split, self.subset)
        return sample(rows, None, self.limit, seed)


def read_rows(
    source: str | Path,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    subset: str | None = None,
    or_ours: bool = False,
) -> list[Row]:
    """The rows of a file or of a Hub data set, every one checked.

    Args:
        source: path or Hub id; see :class:`Data`.
        columns: as in :class:`Data`.
        split: split of a Hub data set.
        subset: subset of a Hub data set.
        or_ours: leave ``columns`` out where the first row lacks one of them, and is a row without them.

    Raises:
        PrefixMemoryError: nothing can be read there, or a row is cut off or lacks fields; the message names its line.
    """
    rows: list[Row] = []
    for where, fields in fields_of(source, split, subset):
        if or_ours and columns and not rows and not _has(fields, columns) and kind_of(as_messages(where, fields)):
            columns = None
        row = check_row(where, _renamed(where, fields, columns))
        rows.append(row)
        if len(rows) > 1:
            check_same_format([rows[0], row])
    if not rows:
        raise PrefixMemoryError(f"The data file {source} is empty. {EXPECTED}")
    return rows


def sample(rows: list[Row], per_label: int | None, limit: int | None, seed: int) -> list[Row]:
    """``per_label`` rows of each label, or ``limit`` rows, drawn with ``seed``; in the order of the file."""
    chosen = list(range(len(rows)))
    random.Random(seed).shuffle(chosen)
    if per_label is not None:
        if kind_of(rows[0]) != "text":
            raise PrefixMemoryError(f"per_label={per_label} needs rows with 'text' and 'label'. Use limit instead.")
        counts: dict[str, int] = {}
        kept = []
        for index in chosen:
            label = rows[index]["label"]
            counts[label] = counts.get(label, 0) + 1
            if counts[label] <= per_label:
                kept.append(index)
        chosen = kept
    return [rows[index] for index in sorted(chosen[:limit])]


def northline(split: str) -> list[Row]:
    """The intent data set that ships with the package; ``split`` is ``train`` or ``test``."""
    return read_rows(Path(str(files("prefixmemory") / "data" / "northline" / f"{split}.jsonl")))


def _renamed(where: str, fields: dict[str, Any], columns: Mapping[str, str] | None) -> dict[str, Any]:
    """``fields`` with the columns that a recipe maps, under our names."""
    if not columns:
        return fields
    renamed, used = dict(fields), set()
    for ours, theirs in columns.items():
        template = _template(ours, theirs)
        used |= {name for _, name in template if name is not None}
        if template == [("", theirs)]:
            renamed[ours] = _column(where, theirs, fields)
        else:
            renamed[ours] = "".join(
                text + ("" if name is None else _as_text(where, name, _column(where, name, fields)))
                for text, name in template
            )
    # A column that another field was made from may bear a name that means something else here.
    for name in used - columns.keys():
        del renamed[name]
    return renamed


def _has(fields: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
    """Whether all columns that ``columns`` asks for are there."""
    return all(name is None or name in fields for item in columns.items() for _, name in _template(*item))


def _template(ours: str, theirs: str) -> list[tuple[str, str | None]]:
    """``theirs`` in parts: a text, and the column that follows it. A mere name of a column is one part."""
    if "{" not in theirs:
        return [("", theirs)]
    try:
        parts = list(string.Formatter().parse(theirs))
    except ValueError as error:
        raise PrefixMemoryError(
            f"columns.{ours}={theirs!r}: {str(error).lower()}. Write a column as {{name}}, a brace as {{{{ or }}}}."
        ) from error
    for _, name, form, conversion in parts:
        if form or conversion:
            raise PrefixMemoryError(f"columns.{ours}={theirs!r}: write columns in braces as they are, {{{name}}}.")
    return [(text, name) for text, name, _, _ in parts]


def _column(where: str, name: str, fields: Mapping[str, Any]) -> Any:
    if name not in fields:
        raise PrefixMemoryError(
            f"{where}: has no column {name!r}, which columns asks for.{did_you_mean(name, fields)} "
            f"There are: {', '.join(fields)}."
        )
    return fields[name]


def _as_text(where: str, name: str, value: object) -> str:
    if value is None:  # as the empty cell of a CSV file
        return ""
    if not isinstance(value, str | int | float):
        raise PrefixMemoryError(f"{where}: {name!r} holds {type(value).__name__}, and cannot be put into a text.")
    return str(value)
