"""Rows as text: what the model reads, and what it shall write, by its chat template where it has one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.rows.chat_template import ByTemplate, chat_prompt, end_of, end_tokens, has_chat_template
from prefixmemory.rows.conversations import earlier_turns
from prefixmemory.rows.rows import FORMATS, Rows, kind_of, place_of


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


def question_and_answer(row: Mapping[str, Any]) -> tuple[str, str]:
    """Prompt and completion of a row of kind ``prompt`` or ``instruction``."""
    if kind_of(row) == "instruction":
        given = row.get("input")
        return f"{row['instruction']}\n\n{given}" if given else row["instruction"], row["output"]
    return row["prompt"], row["completion"]


def right_answer(row: Mapping[str, Any]) -> str:
    """What the model should write to a row that has one right answer, without blanks around it."""
    return str(row["label"] if kind_of(row) == "text" else question_and_answer(row)[1]).strip()


def render_prompt(
    text: str, format_: str, tokenizer: PreTrainedTokenizerBase, given: Mapping[str, Any] | None = None
) -> str:
    """``text`` as the prompt of a row of that kind was rendered in training; an unknown kind leaves it as it is.

    ``given``: the row's ``chat_template_kwargs``.
    """
    if format_ == "text":
        return classification_prompt(text)
    if format_ in FORMATS and has_chat_template(tokenizer):
        return chat_prompt([{"role": "user", "content": text}], tokenizer, **(given or {}))
    return text


def render(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Rows as prompt and completion, by the model's chat template where the row is a conversation.

    A completion ends with an end token: the chat template's, or else the tokenizer's.

    Raises:
        PrefixMemoryError: the chat template refuses a conversation or leaves out a part of it, or there is no end
            token.
    """
    by_template, ends = ByTemplate(tokenizer), end_tokens(tokenizer)
    examples = []
    for number, row in enumerate(rows, start=1):
        where, kind = place_of(row, f"Row {number}"), kind_of(row)
        if kind == "text":
            example = Example(classification_prompt(row["text"]), f" {row['label']}", where)
        elif kind == "messages":
            if not has_chat_template(tokenizer):
                raise PrefixMemoryError(
                    f"{where} holds messages, but this model's tokenizer has no chat template. "
                    'Use rows with "prompt" and "completion", or a chat model.'
                )
            example = Example(*by_template(row["messages"], row, where))
        else:
            prompt, completion = question_and_answer(row)
            example, earlier = Example(prompt, completion, where), earlier_turns(row)
            if has_chat_template(tokenizer):
                messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
                example = Example(*by_template([*earlier, *messages], {}, where))
            elif earlier:
                name = "system" if row.get("system") else "history"
                raise PrefixMemoryError(
                    f"{where} has a {name!r} beside its question, but this model's tokenizer has no chat template to "
                    "write it by. Make it a part of the question, or use a chat model."
                )
        examples.append(Example(example.prompt, _ended(example.completion, tokenizer, ends, where), where))
    return examples


def _ended(completion: str, tokenizer: PreTrainedTokenizerBase, ends: set[str], where: str) -> str:
    """``completion`` up to the token that ends it; where it has none, with the tokenizer's."""
    if end_of(completion, ends):
        return completion.rstrip()  # nothing is written behind the end
    if tokenizer.eos_token is None:
        raise PrefixMemoryError(
            f"{where}: nothing says where the answer ends: this model's tokenizer has no end token. Set its eos_token "
            "and save it with save_pretrained."
        )
    return f"{completion}{tokenizer.eos_token}"
