"""Training rows: reading a JSONL file, checking every line, rendering prompt and completion."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefixmemory.errors import PrefixMemoryError, did_you_mean

FORMATS: tuple[tuple[str, ...], ...] = (("prompt", "completion"), ("messages",), ("text", "label"))
_EXPECTED = 'Each line is a JSON object with "prompt" and "completion", with "messages", or with "text" and "label".'


@dataclass(frozen=True)
class Example:
    """One training or test example, rendered: the model reads ``prompt`` and shall write ``completion``."""

    prompt: str
    completion: str


def classification_prompt(text: str, labels: list[str] | None = None) -> str:
    """The prompt for ``{"text", "label"}`` rows; the labels are listed for a model that was not trained on them."""
    listed = "" if labels is None else f"Choose one of these labels: {', '.join(labels)}.\n\n"
    return f"{listed}Text: {text}\nLabel:"


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, every line checked before anything is done with them.

    Raises:
        PrefixMemoryError: the file is missing or empty, or a line is cut off, no object, or lacks fields.
    """
    if not file.is_file():
        problem = "is a folder" if file.is_dir() else "does not exist"
        raise PrefixMemoryError(f"The data file {file} {problem}. Give the path of a JSONL file. {_EXPECTED}")
    rows: list[dict[str, Any]] = []
    with file.open("rb") as stream:  # bytes: a cut-off last line may end within a character
        for number, line in enumerate(stream, start=1):
            if line.strip():
                rows.append(_check_row(file, number, line))
                if _format(rows[-1]) != _format(rows[0]):
                    raise PrefixMemoryError(
                        f"{file}, line {number}: has {_format(rows[-1])} where the first row has {_format(rows[0])}. "
                        "Use one format a file."
                    )
    if not rows:
        raise PrefixMemoryError(f"The data file {file} is empty. {_EXPECTED}")
    return rows


def _check_row(file: Path, number: int, line: bytes) -> dict[str, Any]:
    where = f"{file}, line {number}"
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PrefixMemoryError(f"{where}: not complete JSON ({error}). Was the file cut off? {_EXPECTED}") from error
    if not isinstance(row, dict):
        raise PrefixMemoryError(f"{where}: holds {type(row).__name__}, not an object. {_EXPECTED}")
    fields = _format(row)
    if fields is None:
        wanted = [field for format_ in FORMATS for field in format_]
        hints = (did_you_mean(name, wanted) for name in row if name not in wanted)
        hint = next((hint for hint in hints if hint), "")
        raise PrefixMemoryError(f"{where}: has the fields {sorted(row)}.{hint} {_EXPECTED}")
    for field in fields:
        value = row[field]
        if field == "messages":
            _check_messages(where, value)
        elif not isinstance(value, str) or not value.strip():
            raise PrefixMemoryError(f"{where}: {field!r} is {value!r}; it must be a text that is not empty.")
    return row


def _check_messages(where: str, messages: object) -> None:
    well_formed = (
        isinstance(messages, list)
        and len(messages) >= 2
        and all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in messages)
    )
    if not well_formed or messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():  # type: ignore[index]
        raise PrefixMemoryError(
            f'{where}: "messages" must be a list of objects with "role" and "content" that ends with the answer of '
            'the "assistant".'
        )


def _format(row: dict[str, Any]) -> tuple[str, ...] | None:
    return next((format_ for format_ in FORMATS if set(format_) <= row.keys()), None)


def labels_of(rows: list[dict[str, Any]]) -> list[str]:
    """The labels of ``{"text", "label"}`` rows, sorted."""
    return sorted({row["label"] for row in rows})


def row_format(rows: list[dict[str, Any]]) -> str:
    """Name of the rows' format, as :func:`render_prompt` takes it: ``prompt``, ``messages`` or ``text``."""
    fields = _format(rows[0])
    assert fields is not None, "rows come from read_rows"
    return fields[0]


def render_prompt(text: str, format_: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """``text`` as the prompt of a row of that format was rendered in training; any other name leaves it as it is."""
    if format_ == "text":
        return classification_prompt(text)
    if format_ in ("prompt", "messages") and getattr(tokenizer, "chat_template", None) is not None:
        question = [{"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True))
    return text


def render(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Rows as prompt and completion, by the model's chat template where the row is a conversation."""
    return list(_renderer(rows, tokenizer))


def _renderer(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    has_template = getattr(tokenizer, "chat_template", None) is not None
    for number, row in enumerate(rows, start=1):
        fields = _format(row)
        if fields == ("text", "label"):
            yield Example(classification_prompt(row["text"]), f" {row['label']}{tokenizer.eos_token}")
        elif fields == ("messages",):
            if not has_template:
                raise PrefixMemoryError(
                    f"Row {number} holds messages, but this model's tokenizer has no chat template. "
                    'Use rows with "prompt" and "completion", or a chat model.'
                )
            yield _chat_example(row["messages"], tokenizer)
        elif has_template:
            question = {"role": "user", "content": row["prompt"]}
            yield _chat_example([question, {"role": "assistant", "content": row["completion"]}], tokenizer)
        else:
            yield Example(row["prompt"], f"{row['completion']}{tokenizer.eos_token}")


def _chat_example(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Example:
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    prompt = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
    if not whole.startswith(prompt):
        raise PrefixMemoryError(
            "This model's chat template writes an answer differently from how it asks for one, so prompt and answer "
            'cannot be told apart. Use rows with "prompt" and "completion" and a tokenizer without chat template.'
        )
    return Example(prompt, whole[len(prompt) :])


def northline(split: str) -> list[dict[str, Any]]:
    """The intent data set that ships with the package; ``split`` is ``train`` or ``test``."""
    return read_rows(Path(str(files("prefixmemory") / "data" / "northline" / f"{split}.jsonl")))
