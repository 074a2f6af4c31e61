"""Rows as text: what the model reads, and what it shall write, by its chat template where it has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.rows.rows import FORMATS, Rows, kind_of, place_of

Message = Mapping[str, Any]


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


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether questions are asked by a chat template."""
    return getattr(tokenizer, "chat_template", None) is not None


def chat_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, **given: Any) -> str:
    """A conversation as the chat template writes it, up to where the next answer begins.

    Args:
        messages: objects with ``role`` and ``content``.
        tokenizer: has a chat template.
        given: what the template gets beside the messages, such as ``tools``.
    """
    return _written(messages, tokenizer, add_generation_prompt=True, **given)


def render_prompt(text: str, format_: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """``text`` as the prompt of a row of that kind was rendered in training; an unknown kind leaves it as it is."""
    if format_ == "text":
        return classification_prompt(text)
    if format_ in FORMATS and has_chat_template(tokenizer):
        return chat_prompt([{"role": "user", "content": text}], tokenizer)
    return text


def render(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Rows as prompt and completion, by the model's chat template where the row is a conversation.

    A completion ends with an end token: the chat template's, or else the tokenizer's.

    Raises:
        PrefixMemoryError: the chat template refuses a conversation or leaves out a part of it, or there is no end
            token.
    """
    by_template, ends = _ByTemplate(tokenizer), _end_tokens(tokenizer)
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
            example = by_template(row["messages"], row, where)
        else:
            prompt, completion = question_and_answer(row)
            example = Example(prompt, completion, where)
            if has_chat_template(tokenizer):
                messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
                example = by_template(messages, {}, where)
        examples.append(Example(example.prompt, _ended(example.completion, tokenizer, ends, where), where))
    return examples


def _ended(completion: str, tokenizer: PreTrainedTokenizerBase, ends: set[str], where: str) -> str:
    """``completion`` up to the token that ends it; where it has none, with the tokenizer's."""
    if _end_of(completion, ends):
        return completion.rstrip()  # nothing is written behind the end
    if tokenizer.eos_token is None:
        raise PrefixMemoryError(
            f"{where}: nothing says where the answer ends: this model's tokenizer has no end token. Set its eos_token "
            "and save it with save_pretrained."
        )
    return f"{completion}{tokenizer.eos_token}"


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The special tokens with which an answer may end; some tokenizers take long to list theirs."""
    eos = tokenizer.eos_token
    no_ends = {tokenizer.bos_token, tokenizer.unk_token, tokenizer.pad_token, tokenizer.mask_token} - {eos}
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} | {eos}
    return {token for token in special - no_ends if token}


def _end_of(completion: str, ends: set[str]) -> str | None:
    """The one with which ``completion`` ends, blanks aside, or ``None``."""
    written = completion.rstrip()
    return next((token for token in ends if written.endswith(token)), None)


def template_end(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token with which the chat template ends an answer; ``None`` where there is no such thing."""
    if not has_chat_template(tokenizer):
        return None
    question = {"role": "user", "content": "a"}
    try:
        written = _written([question, {"role": "assistant", "content": "b"}], tokenizer)
    except TemplateError:
        return None
    return _end_of(written, _end_tokens(tokenizer))


def _written(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, **given: Any) -> str:
    chat: Any = tokenizer
    return str(chat.apply_chat_template(list(messages), tokenize=False, **given))


class _ByTemplate:
    """Renders conversations by the chat template, and refuses what it would leave out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.complete: set[object] = set()

    def __call__(self, messages: Sequence[Message], row: Mapping[str, Any], where: str) -> Example:
        given = {name: row[name] for name in ("tools", "documents") if row.get(name)}
        given |= row.get("chat_template_kwargs") or {}
        try:
            whole = _written(messages, self.tokenizer, **given)
            prompt = chat_prompt(messages[:-1], self.tokenizer, **given)
            vanished = self._vanished(messages, given, whole)
        except (TemplateError, TypeError) as error:  # TypeError: a template that puts together texts and what is none
            raise PrefixMemoryError(
                f"{where}: the model's chat template refuses this conversation ({error})."
            ) from error
        if vanished:
            raise PrefixMemoryError(
                f"{where}: the model's chat template leaves out {vanished}. Change it to what the template knows "
                "(often the roles system, user and assistant only), or use another chat template."
            )
        if not whole.startswith(prompt):
            raise PrefixMemoryError(
                "This model's chat template writes an answer differently from how it asks for one, so prompt and "
                'answer cannot be told apart. Use rows with "prompt" and "completion" and a tokenizer without chat '
                "template."
            )
        return Example(prompt, whole[len(prompt) :], where)

    def _vanished(self, messages: Sequence[Message], given: Mapping[str, Any], whole: str) -> str | None:
        """What of a conversation is not in its rendering.

        Templates may change a content (blanks, what was thought in earlier turns), so that it cannot be looked for as
        it is: each is replaced by a word of its own, once for conversations of the same shape.
        """
        for number, message in enumerate(messages, start=1):
            for call in message.get("tool_calls") or ():
                name = call.get("function", call).get("name")
                if str(name) not in whole:
                    return f"the call of {name!r} in message {number}"
        if "".join((messages[-1].get("content") or "").split()) not in "".join(whole.split()):
            return "a part of the answer"
        shape = tuple((m["role"], bool(m.get("content")), "tool_calls" in m) for m in messages), tuple(given)
        if shape in self.complete:
            return None
        words = [f"message{i}word" if m.get("content") else "" for i, m in enumerate(messages)]
        marked = [{**m, "content": word or m.get("content")} for m, word in zip(messages, words, strict=True)]
        written = _written(marked, self.tokenizer, **given)
        for number, (message, word) in enumerate(zip(messages, words, strict=True), start=1):
            if word not in written:
                return f"message {number}, of role {message['role']!r}"
        for name in ("tools", "documents"):
            rest = {other: value for other, value in given.items() if other != name}
            if name in given and _written(marked, self.tokenizer, **rest) == written:
                return f"the {name}"
        self.complete.add(shape)
        return None
