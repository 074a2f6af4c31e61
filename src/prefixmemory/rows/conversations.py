"""Conversations: their messages, and what else a chat template is given, checked and in one form."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.files.json_text import parse_json

#: Who speaks in ShareGPT's files, and the role of chat templates.
_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
#: What ``apply_chat_template`` itself is told.
_TAKEN = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {"self", "kwargs"}


def as_messages(where: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """``fields`` with ``messages`` in the place of ShareGPT's ``conversations``; a ``system`` text beside either stands
    in front of them, where they have none. Other rows as they are.

    Raises:
        PrefixMemoryError: a speaker whose role nobody knows.
    """
    turns = fields.get("messages", fields.get("conversations"))
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return fields
    messages = []
    for number, turn in enumerate(turns, start=1):
        if "from" in turn and "messages" not in fields:
            if not isinstance(turn["from"], str) or turn["from"] not in _SHAREGPT:
                raise PrefixMemoryError(
                    f"{where}: 'from' is {turn['from']!r} in turn {number}; it must be one of {', '.join(_SHAREGPT)}. "
                    'For other roles, give "messages" with "role" and "content".'
                )
            turn = {"role": _SHAREGPT[turn["from"]], "content": turn.get("value")}
        messages.append(turn)
    system = fields.get("system")
    if isinstance(system, str) and system.strip() and messages and messages[0].get("role") != "system":
        messages.insert(0, {"role": "system", "content": system})
    return {name: value for name, value in fields.items() if name != "conversations"} | {"messages": messages}


def checked_conversation(where: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """``messages``, ``tools``, ``documents`` and ``chat_template_kwargs`` of a row, as a chat template takes them.

    A content that is a list of texts becomes one text; tools may be written as JSON.

    Raises:
        PrefixMemoryError: one of them is malformed, or the conversation does not end with an answer.
    """
    messages = fields["messages"]
    if not isinstance(messages, list) or len(messages) < 2 or not all(isinstance(m, dict) for m in messages):
        messages = []
    # what a message does not have is null where rows are columns, as in Parquet files
    messages = [{name: value for name, value in message.items() if value is not None} for message in messages]
    for message in messages:
        message["content"] = _text(message.get("content"))
    if not messages or not all(map(_is_message, messages)) or messages[-1]["role"] != "assistant":
        raise PrefixMemoryError(
            f'{where}: "messages" must be a list of objects with "role" and "content" (a text, a list of parts of type '
            '"text", or null beside the "tool_calls" of an assistant) that ends with the answer of the "assistant".'
        )
    if not (messages[-1]["content"] or "").strip() and not messages[-1].get("tool_calls"):
        raise PrefixMemoryError(f'{where}: the answer of the "assistant" that ends "messages" is empty.')
    found = {"messages": messages}
    for name in ("tools", "documents"):
        value = fields.get(name)
        if isinstance(value, str) and value.strip():
            try:
                found[name] = value = parse_json(value)
            except ValueError as error:
                raise PrefixMemoryError(f"{where}: {name!r} is a text, and no JSON ({error}).") from error
        if value and not (isinstance(value, list) and all(isinstance(one, dict) for one in value)):
            raise PrefixMemoryError(f"{where}: {name!r} must be a list of objects.")
    checked_variables(where, fields.get("chat_template_kwargs"))
    return found


def checked_variables(where: str, given: object) -> dict[str, Any]:
    """``chat_template_kwargs``, which may be ``None``.

    Raises:
        PrefixMemoryError: they are no variables of a chat template.
    """
    given = given or {}
    if not isinstance(given, dict) or not _TAKEN.isdisjoint(given):
        raise PrefixMemoryError(
            f"{where}: 'chat_template_kwargs' is {given!r}; it must be an object with variables of the chat template, "
            f"none of which is called {', '.join(sorted(_TAKEN))}."
        )
    return given


def checked_earlier(where: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """``system`` and ``history`` of a row with one question, as LLaMA-Factory's files have them, where they say
    anything; what is empty is left out.

    Raises:
        PrefixMemoryError: one of them is malformed.
    """
    system, history = fields.get("system"), fields.get("history")
    if isinstance(history, str):  # as tables write it
        with suppress(ValueError):  # refused below
            history = parse_json(history.strip() or "null")
    if system is not None and not isinstance(system, str):
        raise PrefixMemoryError(f"{where}: 'system' is {system!r}; it must be a text, or be left out.")
    if history is not None and not (isinstance(history, list) and all(map(_is_pair, history))):
        raise PrefixMemoryError(
            f"{where}: 'history' is {history!r}; it must be a list of pairs, question and answer, or be left out."
        )
    return {name: value for name, value in (("system", (system or "").strip()), ("history", history)) if value}


def earlier_turns(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """What stands before the question of such a row, as messages."""
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return system + [
        {"role": role, "content": text}
        for pair in row.get("history") or ()
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _is_pair(turn: object) -> bool:
    return isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


def _text(content: object) -> object:
    """A list of texts as one text; any other content as it is."""
    parts = content if isinstance(content, list) else []
    texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return "".join(texts) if parts and len(texts) == len(parts) else content


def _is_message(message: Mapping[str, Any]) -> bool:
    calls = message.get("role") == "assistant" and bool(message.get("tool_calls")) and message["content"] is None
    return isinstance(message.get("role"), str) and (calls or isinstance(message["content"], str))
