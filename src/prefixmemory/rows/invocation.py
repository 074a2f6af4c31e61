"""The tokens from which on a memory speaks, found in how a tokenizer writes questions and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from prefixmemory.errors import PrefixMemoryError, check_choice
from prefixmemory.rows.chat_template import chat_prompt, has_chat_template
from prefixmemory.rows.conversations import earlier_turns
from prefixmemory.rows.encoding import Tokens, begins, encode_prompts
from prefixmemory.rows.rendering import classification_prompt
from prefixmemory.rows.rows import ASKED_ONCE, FORMATS, Rows, kind_of

#: What the tokens are called that recipes find by themselves.
NAMES = ("question", "answer")
#: The field of PEFT's LoraConfig that makes it an activated LoRA (arXiv 2504.12397).
ALORA = "alora_invocation_tokens"
#: Questions that have no beginning and no end in common; those with line breaks and blanks share a token with what
#: stands before or behind them in many tokenizers, and that token is none of the invocation.
QUESTIONS = ("green apples?", "Why 42", "\n\nHuman: yes\n", " (a) no ")
#: Texts in front of the prompt of a row that has no chat template.
FRONTS = ("", "A text in front.\n\n", "1. Another one!\n\n")


def invocation_tokens(active_from: str, tokenizer: PreTrainedTokenizerBase, kind: str | None = None) -> list[int]:
    """The tokens that introduce a question, or that end a prompt, whatever the question.

    Args:
        active_from: ``question`` or ``answer``.
        tokenizer: of the base model.
        kind: of the rows, by name in ``rows.FORMATS``; ``None``: conversations, by the tokenizer's chat template.

    Raises:
        PrefixMemoryError: no tokens stand there, and nowhere behind, in all prompts of such rows.
    """
    check_choice("active_from", active_from, NAMES)
    if kind is not None:
        check_choice("kind", kind, tuple(FORMATS))
    prompts = _classification() if kind == "text" else _conversations(tokenizer)
    encoded = [encode_prompts(group, tokenizer) for group in prompts]
    if active_from == "answer":
        found = _common_end([ids for group in encoded for ids in group])
    else:
        headers = [_common_beginning(group) for group in encoded]
        found = _common_end(headers)
        places = [len(header) - len(found) for header in headers]
        if any(begins(ids, found) != place for group, place in zip(encoded, places, strict=True) for ids in group):
            found = []  # so few tokens that they stand behind the question, too
    if not found:
        why = "" if kind == "text" or has_chat_template(tokenizer) else "; there is no chat template"
        raise PrefixMemoryError(
            f"active_from={active_from!r} cannot be told from the tokens of such prompts: no tokens mark the place in "
            f"all of them{why}. Use active_from='start', or 'invocation' with invocation_tokens of your own."
        )
    return found


def _classification() -> list[list[str]]:
    """Prompts that differ in their questions alone, for each text in front."""
    return [[front + classification_prompt(question) for question in QUESTIONS] for front in FRONTS]


def _conversations(tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """The same as conversations of different lengths."""
    if not has_chat_template(tokenizer):
        return [list(QUESTIONS)]
    turn = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Yes."}]
    return [
        [chat_prompt([*front, {"role": "user", "content": question}], tokenizer) for question in QUESTIONS]
        for front in ([], turn)
    ]


def _common_beginning(rows: Sequence[list[int]]) -> list[int]:
    pairs = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))
    return [tokens[0] for tokens in pairs]


def _common_end(rows: Sequence[list[int]]) -> list[int]:
    return _common_beginning([row[::-1] for row in rows])[::-1]


def settle(config: Any, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> None:
    """Give a config that names its invocation the tokens that it has in the prompts of ``rows``: a memory's, or that of
    PEFT's activated LoRA, whose ``alora_invocation_tokens`` may be a name here. ``auto`` becomes ``question`` or
    ``start``.

    Raises:
        PrefixMemoryError: they have none in common.
    """
    active_from = getattr(config, "active_from", None)
    if active_from == "auto":
        try:
            config.invocation_tokens = _in_rows("question", "active_from", tokenizer, rows)
            config.active_from = "question"
        except PrefixMemoryError:
            config.active_from = "start"
    elif active_from in NAMES and config.invocation_tokens is None:
        config.invocation_tokens = _in_rows(active_from, "active_from", tokenizer, rows)
    if (name := getattr(config, ALORA, None)) in NAMES:
        setattr(config, ALORA, _in_rows(cast(str, name), ALORA, tokenizer, rows))


def invocation_of(config: Any) -> list[int] | None:
    """The tokens from which on an adapter speaks; ``None``: from the start."""
    return getattr(config, "invocation_tokens", None) or getattr(config, ALORA, None)


def _in_rows(name: str, field: str, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> list[int]:
    kinds = {"text" if kind_of(row) == "text" else None for row in rows}  # others are written as conversations
    found = {kind: invocation_tokens(name, tokenizer, kind) for kind in kinds}
    if len({tuple(tokens) for tokens in found.values()}) > 1:
        raise PrefixMemoryError(
            f"{field}={name!r} has other tokens in rows with text and label than in conversations: "
            f"{found['text']} and {found[None]}. Train on one kind of rows, or give invocation_tokens."
        )
    return next(iter(found.values()))


def occurrences(ids: list[int], invocation: list[int]) -> int:
    """How often ``invocation`` stands in ``ids``."""
    starts = [i for i, token in enumerate(ids) if token == invocation[0]]
    return sum(ids[i : i + len(invocation)] == invocation for i in starts)


def questions(row: Mapping[str, Any]) -> int:
    """How many questions the prompt of ``row`` asks: one behind those of its history, or the user's turns of a
    conversation."""
    kind = kind_of(row)
    turns = row["messages"] if kind == "messages" else earlier_turns(row) if kind in ASKED_ONCE else []
    return len([turn for turn in turns if turn["role"] == "user"]) + int(kind != "messages")


def check_invoked(rows: Sequence[Tokens], invocation: Sequence[int], places: Sequence[str]) -> None:
    """Refuse rows without the invocation, from which a memory could not learn.

    Args:
        rows: as they are trained on.
        invocation: tokens.
        places: where each row stands, for the message.
    """
    texts = [tokens.prompt + tokens.completion for tokens in rows]
    missing = [place for ids, place in zip(texts, places, strict=True) if begins(ids, invocation) is None]
    if missing:
        others = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise PrefixMemoryError(
            f"{missing[0]}{others}: the tokens {list(invocation)}, from which on the adapter speaks, are not in it, so "
            "nothing could be learned from it. A row that is longer than max_length loses the beginning of its prompt; "
            "raise max_length, or give other tokens of invocation."
        )
