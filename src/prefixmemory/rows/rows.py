"""Training rows: which fields they have, checked before they are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from prefixmemory.errors import PrefixMemoryError, did_you_mean
from prefixmemory.rows.conversations import as_messages, checked_conversation, checked_earlier

Fields = tuple[str, ...]
#: Rows as functions take them: a :class:`Row` where they were read from a file, or plain mappings.
Rows = Sequence[Mapping[str, Any]]

#: Kinds of rows by the fields that make them; the first kind whose fields are all there is the row's. Rows of kind
#: ``judged`` have a yes or a no for their label.
FORMATS: dict[str, Fields] = {
    "preference": ("prompt", "chosen", "rejected"),
    "judged": ("prompt", "completion", "label"),
    "prompt": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text", "label"),
    "instruction": ("instruction", "output"),
}
#: Which kinds of rows an objective can be trained on.
OBJECTIVE_FORMATS: dict[str, Fields] = {
    "sft": ("prompt", "messages", "text", "instruction"),
    "dpo": ("preference",),
    "kto": ("judged", "preference"),
    "simpo": ("preference",),
}
#: Kinds of rows with one question, in front of which ``system`` and ``history`` may stand.
ASKED_ONCE = ("preference", "judged", "prompt", "instruction")
EXPECTED = (
    'Each row is an object with "prompt" and "completion", with "messages", with "text" and "label", or with '
    '"instruction" and "output"; for preferences with "prompt", "chosen" and "rejected", or with "prompt", '
    '"completion" and a "label" that is true or false.'
)
#: In characters; ten long books.
LONGEST_TEXT = 10_000_000
_ANSWERS = ("chosen", "rejected", "completion")
_JUDGEMENTS = {True: True, False: False, "true": True, "false": False, "True": True, "False": False}


class Row(dict[str, Any]):
    """The fields of one row, and ``where`` it stands, for messages: ``tickets.jsonl, line 12``."""

    where: str = ""


def labels_of(rows: Rows) -> list[str]:
    """The labels of ``{"text", "label"}`` rows, sorted."""
    return sorted({row["label"] for row in rows})


# Checking


def place_of(row: Mapping[str, Any], otherwise: str) -> str:
    """Where ``row`` stands, for messages."""
    return getattr(row, "where", "") or otherwise


def kind_of(row: Mapping[str, Any]) -> str | None:
    """Name of the row's kind in ``FORMATS``, or ``None``."""
    for kind, fields in FORMATS.items():
        if set(fields) <= row.keys() and (kind != "judged" or _is_judgement(row["label"])):
            return kind
    return None


def _is_judgement(value: object) -> bool:
    return isinstance(value, bool | str) and value in _JUDGEMENTS


def checked(rows: Rows) -> list[Row]:
    """``rows``, plain mappings among them checked as those of a file are."""
    return [row if isinstance(row, Row) else check_row(f"Row {i}", row) for i, row in enumerate(rows, start=1)]


def check_row(where: str, fields: Mapping[str, Any]) -> Row:
    """``fields`` as a :class:`Row`, once they make one.

    Raises:
        PrefixMemoryError: a field is missing, empty or of the wrong type.
    """
    fields = as_messages(where, fields)
    kind = kind_of(fields)
    if kind is None:
        wanted = {name for names in FORMATS.values() for name in names}
        others = islice((name for name in fields if name not in wanted), 20)
        hints = (did_you_mean(name, wanted - fields.keys()) for name in others)
        hint = next((hint for hint in hints if hint), "")
        raise PrefixMemoryError(f"{where}: has the fields {sorted(fields)}.{hint} {EXPECTED}")
    if any(isinstance(value, str) and len(value) > LONGEST_TEXT for value in fields.values()):
        raise PrefixMemoryError(f"{where}: has a text of more than {LONGEST_TEXT:,} characters. Split it.")
    row = Row(fields)
    row.where = where
    for name in FORMATS[kind]:
        value = fields[name]
        if name == "messages":
            row |= checked_conversation(where, fields)
            continue
        if kind == "judged" and name == "label":
            row[name] = _JUDGEMENTS[value]
            continue
        if name == "label" and type(value) is int and value >= 0:  # below 0: a label that a test split hides
            row[name] = value = str(value)
        if not isinstance(value, str) or not value.strip() or not _encodes(value):
            raise PrefixMemoryError(f"{where}: {name!r} is {value!r}; it must be a text that is not empty.")
    given = fields.get("input")  # of an instruction; Alpaca's rows have an empty one where there is none
    if kind == "instruction" and given is not None and not (isinstance(given, str) and _encodes(given)):
        raise PrefixMemoryError(f"{where}: 'input' is {given!r}; it must be a text, or be left out.")
    if kind in ASKED_ONCE:
        earlier = checked_earlier(where, fields)
        for name in ("system", "history"):
            row.pop(name, None)
        row |= earlier
    if kind == "text":
        row["label"] = row["label"].strip()  # answers are compared without blanks around them
        if len(row["label"].splitlines()) > 1:
            raise PrefixMemoryError(
                f"{where}: 'label' is {row['label']!r}, and an answer is compared by its first line. Write a label in "
                'one line, or give "prompt" and "completion".'
            )
    return row


def _encodes(text: str) -> bool:
    """Whether ``text`` is Unicode: JSON may hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_same_format(rows: list[Row]) -> None:
    """Refuse a file whose rows are of two kinds."""
    for row in rows:
        if kind_of(row) != kind_of(rows[0]):
            raise PrefixMemoryError(
                f"{row.where}: has {FORMATS[row_format([row])]} where the first row has "
                f"{FORMATS[row_format(rows)]}. Use one format a file."
            )


def row_format(rows: Rows) -> str:
    """Name of the rows' kind in ``FORMATS``."""
    kind = kind_of(rows[0])
    assert kind is not None, "rows come from read_rows"
    return kind


def check_objective(objective: str, rows: Rows) -> None:
    """Refuse rows that ``objective`` cannot be trained on."""
    kind, possible = row_format(rows), OBJECTIVE_FORMATS[objective]
    if objective == "kto" and kind == "prompt" and "label" in rows[0]:
        where, label = place_of(rows[0], "the data"), rows[0]["label"]
        raise PrefixMemoryError(f"{where}: 'label' is {label!r}; for objective='kto' it must be true or false.")
    if kind not in possible:
        fitting = [name for name, kinds in OBJECTIVE_FORMATS.items() if kind in kinds]
        wanted = " or ".join(str(list(FORMATS[kind])) for kind in possible)
        raise PrefixMemoryError(
            f"objective={objective!r} needs rows with {wanted}; {place_of(rows[0], 'the data')} has "
            f"{list(FORMATS[kind])}. For such rows, use {' or '.join(f'objective={name!r}' for name in fitting)}."
        )


# Rows with several answers


def answers_a_row(rows: Rows) -> int:
    """How many answers each of ``rows``, which are of one kind, has."""
    return len(_answers(rows)) if rows else 1


def with_one_answer(rows: Rows) -> list[Row]:
    """Each answer of each of ``rows``, which are of one kind with a prompt, as a row of its own; those to one prompt
    side by side."""
    found = []
    for row in rows:
        for name in _answers(rows):
            earlier = {name: row[name] for name in ("system", "history") if name in row}
            found.append(Row(prompt=row["prompt"], completion=row[name], **earlier))
            found[-1].where = getattr(row, "where", "")
    return found


def _answers(rows: Rows) -> list[str]:
    """The fields that hold the answers of rows of this kind; others of these names are columns that mean nothing."""
    return [name for name in _ANSWERS if name in FORMATS[row_format(rows)]]
