"""Conversations as a model's chat template writes them, all of them or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.files.json_text import parse_json

Message = Mapping[str, Any]
#: Fields of an answer in which it is written down what was thought.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_ANSWER = "theanswer"
#: Arguments of a call, by which it is found out how a template writes them.
_PROBE = {"argumentname": "argumentvalue"}


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


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The special tokens with which an answer may end; some tokenizers take long to list theirs."""
    eos = tokenizer.eos_token
    no_ends = {tokenizer.bos_token, tokenizer.unk_token, tokenizer.pad_token, tokenizer.mask_token} - {eos}
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} | {eos}
    return {token for token in special - no_ends if token}


def end_of(completion: str, ends: set[str]) -> str | None:
    """The one with which ``completion`` ends, blanks aside, or ``None``."""
    written = completion.rstrip()
    return next((token for token in ends if written.endswith(token)), None)


def template_end(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token with which the chat template ends an answer; ``None`` where there is no such thing."""
    written = _question_and_answer(tokenizer)
    return None if written is None else end_of(written[1], end_tokens(tokenizer))


def template_opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes between a prompt and the answer itself, without blanks around it: an empty thought,
    or the name of a channel. A model that has learned from it writes it, too. Empty where there is no such thing."""
    prompt, whole = _question_and_answer(tokenizer) or ("", "")
    if not prompt or not whole.startswith(prompt):
        return ""
    opening, found, _ = whole[len(prompt) :].partition(_ANSWER)
    return opening.strip() if found else ""


def _question_and_answer(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """A prompt as the chat template writes it, and the same with its answer; ``None``: it writes no such thing."""
    if not has_chat_template(tokenizer):
        return None
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}
    try:
        return chat_prompt([question], tokenizer), _written([question, answer], tokenizer)
    except TemplateError:
        return None


def _written(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, **given: Any) -> str:
    chat: Any = tokenizer
    return str(chat.apply_chat_template(list(messages), tokenize=False, **given))


class ByTemplate:
    """Renders conversations by the chat template, and refuses what it would leave out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.complete: set[object] = set()

    def __call__(self, messages: Sequence[Message], row: Mapping[str, Any], where: str) -> tuple[str, str]:
        """Prompt and answer of ``messages``; the template gets ``tools``, ``documents`` and ``chat_template_kwargs`` of
        ``row``, too.

        Raises:
            PrefixMemoryError: names ``where`` the template refuses something or leaves it out.
        """
        given = {name: row[name] for name in ("tools", "documents") if row.get(name)}
        given |= row.get("chat_template_kwargs") or {}
        try:
            messages, whole = self._whole(messages, given)
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
        return prompt, whole[len(prompt) :]

    def _whole(self, messages: Sequence[Message], given: Mapping[str, Any]) -> tuple[Sequence[Message], str]:
        """``messages`` as the template takes them, and as it writes them.

        The arguments of calls are objects for most templates, which would write JSON within JSON where they are texts;
        texts for others, which would write Python or fail.
        """
        if not any(map(_calls, messages)):
            return messages, _written(messages, self.tokenizer, **given)
        try:
            probe = _with_arguments(messages, lambda arguments: dict(_PROBE))
            if str(_PROBE) not in _written(probe, self.tokenizer, **given):
                objects = _with_arguments(messages, _as_object)
                return objects, _written(objects, self.tokenizer, **given)
        except (TemplateError, TypeError):
            pass  # it may take texts
        texts = _with_arguments(messages, _as_text)
        return texts, _written(texts, self.tokenizer, **given)

    def _vanished(self, messages: Sequence[Message], given: Mapping[str, Any], whole: str) -> str | None:
        """What of a conversation is not in its rendering.

        Templates may change a content (blanks, what was thought in earlier turns), so that it cannot be looked for as
        it is: each is replaced by a word of its own, once for conversations of the same shape.
        """
        for number, message in enumerate(messages, start=1):
            for call in _calls(message):
                if str(call.get("name")) not in whole:
                    return f"the call of {call.get('name')!r} in message {number}"
        if "".join((messages[-1].get("content") or "").split()) not in "".join(whole.split()):
            return "a part of the answer"
        thoughts = {name: "thoughtword" for name in THOUGHTS if messages[-1].get(name)}
        turns = tuple((m["role"], bool(m.get("content")), "tool_calls" in m) for m in messages)
        variables = {name: value for name, value in given.items() if name not in ("tools", "documents")}
        shape = (turns, tuple(given), str(variables), tuple(thoughts))
        if shape in self.complete:
            return None
        words = [f"message{i}word" if m.get("content") else "" for i, m in enumerate(messages)]
        marked = [{**m, "content": word or m.get("content")} for m, word in zip(messages, words, strict=True)]
        marked[-1] |= thoughts
        written = _written(marked, self.tokenizer, **given)
        for number, (message, word) in enumerate(zip(messages, words, strict=True), start=1):
            if word not in written:
                return f"message {number}, of role {message['role']!r}"
        if thoughts and "thoughtword" not in written:
            return f"the {next(iter(thoughts))!r} of the answer"
        for name in ("tools", "documents"):
            rest = {other: value for other, value in given.items() if other != name}
            if name in given and _written(marked, self.tokenizer, **rest) == written:
                return f"the {name}"
        self.complete.add(shape)
        return None


def _calls(message: Message) -> list[Mapping[str, Any]]:
    return [call.get("function", call) for call in message.get("tool_calls") or ()]


def _with_arguments(messages: Sequence[Message], change: Any) -> list[Message]:
    """``messages`` with the arguments of their calls changed."""

    def changed(call: Mapping[str, Any]) -> dict[str, Any]:
        if "function" in call:
            return {**call, "function": changed(call["function"])}
        return {**call, "arguments": change(call["arguments"])} if "arguments" in call else dict(call)

    return [
        {**message, "tool_calls": [changed(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _as_object(arguments: Any) -> Any:
    try:
        found = parse_json(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
    return found if isinstance(found, dict) else arguments


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
