"""Training rows: which fields they have, and how they become prompt and completion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from prefixmemory.errors import PrefixMemoryError, did_you_mean

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
EXPECTED = (
    'Each row is an object with "prompt" and "completion", with "messages", with "text" and "label", or with '
    '"instruction" and "output"; for preferences with "prompt", "chosen" and "rejected", or with "prompt", '
    '"completion" and a "label" that is true or false.'
)
_JUDGEMENTS = {True: True, False: False, "true": True, "false": False, "True": True, "False": False}


class Row(dict[str, Any]):
    """The fields of one row, and ``where`` it stands, for messages: ``tickets.jsonl, line 12``."""

    where: str = ""


@dataclass(frozen=True)
class Example:
    """One training or test example, rendered: the model reads ``prompt`` and shall write ``completion``."""

    prompt: str
    completion: str
    where: str = field(default="", compare=False)


def classification_prompt(text: str, labels: list[str] | None = None) -> str:
    """The prompt for ``{"text", "label"}`` rows; the labels are listed for a model that was not trained on them."""
    listed = "" if labels is None else f"Choose one of these labels: {', '.join(labels)}.\n\n"
    return f"{listed}Text: {text}\nLabel:"


def labels_of(rows: Rows) -> list[str]:
    """The labels of ``{"text", "label"}`` rows, sorted."""
    return sorted({row["label"] for row in rows})


# Checking


def _where(row: Mapping[str, Any], otherwise: str) -> str:
    return getattr(row, "where", "") or otherwise


def _kind(row: Mapping[str, Any]) -> str | None:
    for kind, fields in FORMATS.items():
        if set(fields) <= row.keys() and (kind != "judged" or _is_judgement(row["label"])):
            return kind
    return None


def _is_judgement(value: object) -> bool:
    return isinstance(value, bool | str) and value in _JUDGEMENTS


def check_row(where: str, fields: Mapping[str, Any]) -> Row:
    """``fields`` as a :class:`Row`, once they make one.

    Raises:
        PrefixMemoryError: a field is missing, empty or of the wrong type.
    """
    kind = _kind(fields)
    if kind is None:
        wanted = {name for names in FORMATS.values() for name in names}
        hints = (did_you_mean(name, wanted - fields.keys()) for name in fields if name not in wanted)
        hint = next((hint for hint in hints if hint), "")
        raise PrefixMemoryError(f"{where}: has the fields {sorted(fields)}.{hint} {EXPECTED}")
    row = Row(fields)
    row.where = where
    for name in FORMATS[kind]:
        value = fields[name]
        if name == "messages":
            _check_messages(where, value)
        elif kind == "judged" and name == "label":
            row[name] = _JUDGEMENTS[value]
        elif not isinstance(value, str) or not value.strip() or not _encodes(value):
            raise PrefixMemoryError(f"{where}: {name!r} is {value!r}; it must be a text that is not empty.")
    if kind == "text":
        row["label"] = row["label"].strip()  # answers are compared without blanks around them
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
        if _kind(row) != _kind(rows[0]):
            raise PrefixMemoryError(
                f"{row.where}: has {FORMATS[row_format([row])]} where the first row has "
                f"{FORMATS[row_format(rows)]}. Use one format a file."
            )


def _check_messages(where: str, messages: object) -> None:
    well_formed = (
        isinstance(messages, list)
        and len(messages) >= 2
        and all(
            isinstance(m, dict) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str)
            for m in messages
        )
    )
    if not well_formed or messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():  # type: ignore[index]
        raise PrefixMemoryError(
            f'{where}: "messages" must be a list of objects with "role" and "content" that ends with the answer of '
            'the "assistant".'
        )


def row_format(rows: Rows) -> str:
    """Name of the rows' kind in ``FORMATS``."""
    kind = _kind(rows[0])
    assert kind is not None, "rows come from read_rows"
    return kind


def check_objective(objective: str, rows: Rows) -> None:
    """Refuse rows that ``objective`` cannot be trained on."""
    kind, possible = row_format(rows), OBJECTIVE_FORMATS[objective]
    if objective == "kto" and kind == "prompt" and "label" in rows[0]:
        where, label = _where(rows[0], "the data"), rows[0]["label"]
        raise PrefixMemoryError(f"{where}: 'label' is {label!r}; for objective='kto' it must be true or false.")
    if kind not in possible:
        fitting = [name for name, kinds in OBJECTIVE_FORMATS.items() if kind in kinds]
        wanted = " or ".join(str(list(FORMATS[kind])) for kind in possible)
        raise PrefixMemoryError(
            f"objective={objective!r} needs rows with {wanted}; {_where(rows[0], 'the data')} has "
            f"{list(FORMATS[kind])}. For such rows, use {' or '.join(f'objective={name!r}' for name in fitting)}."
        )


# Rendering


def render_prompt(text: str, format_: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """``text`` as the prompt of a row of that kind was rendered in training; an unknown kind leaves it as it is."""
    if format_ == "text":
        return classification_prompt(text)
    if format_ in FORMATS and getattr(tokenizer, "chat_template", None) is not None:
        question = [{"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True))
    return text


def render(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Rows as prompt and completion, by the model's chat template where the row is a conversation."""
    return list(_renderer(rows, tokenizer))


def _renderer(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    has_template = getattr(tokenizer, "chat_template", None) is not None
    for number, row in enumerate(rows, start=1):
        where = _where(row, f"Row {number}")
        kind = _kind(row)
        if kind == "text":
            yield Example(classification_prompt(row["text"]), f" {row['label']}{tokenizer.eos_token}", where)
        elif kind == "messages":
            if not has_template:
                raise PrefixMemoryError(
                    f"{where} holds messages, but this model's tokenizer has no chat template. "
                    'Use rows with "prompt" and "completion", or a chat model.'
                )
            yield _chat_example(row["messages"], tokenizer, where)
        else:
            prompt, completion = question_and_answer(row)
            if has_template:
                question = {"role": "user", "content": prompt}
                yield _chat_example([question, {"role": "assistant", "content": completion}], tokenizer, where)
            else:
                yield Example(prompt, f"{completion}{tokenizer.eos_token}", where)


def question_and_answer(row: Mapping[str, Any]) -> tuple[str, str]:
    """Prompt and completion of a row of kind ``prompt`` or ``instruction``."""
    if "instruction" in row and "prompt" not in row:
        given = row.get("input")
        return f"{row['instruction']}\n\n{given}" if given else row["instruction"], row["output"]
    return row["prompt"], row["completion"]


def _chat_example(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, where: str) -> Example:
    try:
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
        prompt = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise PrefixMemoryError(f"{where}: the model's chat template refuses this conversation ({error}).") from error
    if not whole.startswith(prompt):
        raise PrefixMemoryError(
            "This model's chat template writes an answer differently from how it asks for one, so prompt and answer "
            'cannot be told apart. Use rows with "prompt" and "completion" and a tokenizer without chat template.'
        )
    return Example(prompt, whole[len(prompt) :], where)
