"""Texts to token ids: the one place that does it, for training, scoring, chat and generation alike.

Prompt and answer are tokenised as one text, as base models read texts: an answer that is tokenised by itself gets the
mark of a new word, and what a tokenizer adds to the end of a text would come between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.rows.rendering import Example

IGNORED = -100  # label of positions that do not count in the loss


@dataclass(frozen=True)
class Tokens:
    """One example as token ids.

    Attributes:
        prompt: what the model reads, from the beginning-of-sequence token on where the tokenizer writes one.
        completion: what it shall write; the loss counts these.
        cut: whether the prompt lost its beginning.
    """

    prompt: list[int]
    completion: list[int]
    cut: bool = False

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)

    @property
    def feature(self) -> dict[str, list[int]]:
        """``input_ids`` and ``labels``, as a Trainer takes them."""
        return {
            "input_ids": self.prompt + self.completion,
            "labels": [IGNORED] * len(self.prompt) + self.completion,
        }


def begins(ids: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Where the last occurrence of ``invocation`` in ``ids`` begins."""
    n, wanted = len(invocation), list(invocation)
    return next((i for i in range(len(ids) - n, -1, -1) if list(ids[i : i + n]) == wanted), None)


def speaks_from(prompt: Sequence[int], completion: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Where an adapter that waits for ``invocation`` begins to speak while the completion is written: with the last
    occurrence in the prompt; where it has none, with the first that the completion ends."""
    place = begins(prompt, invocation)
    if place is not None:
        return place
    n, ids, wanted = len(invocation), [*prompt, *completion], list(invocation)
    return next((i for i in range(max(0, len(prompt) - n + 1), len(ids) - n + 1) if ids[i : i + n] == wanted), None)


def behind(front: str, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """``text`` behind ``front``, without the beginning-of-sequence token that a chat template wrote before it where the
    tokenizer puts one before the whole."""
    begin = tokenizer.bos_token
    if front and begin and text.startswith(begin) and _added_in_front(tokenizer):
        text = text.removeprefix(begin)
    return front + text


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt, as training saw them: see :func:`encode_prompts`."""
    return encode_prompts([prompt], tokenizer)[0]


def encode_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of prompts, up to where their answers begin.

    The tokenizer's beginning-of-sequence token comes first, once, also where a chat template writes it. Line breaks
    at the end are tokenised as they are in front of a word; blanks there, which often are one token with a word, are
    the answer's.
    """
    found = _bare(prompts, tokenizer)
    blank = [i for i, prompt in enumerate(prompts) if prompt[-1:].isspace()]
    for i, ids in zip(blank, _before_a_word([prompts[i] for i in blank], tokenizer), strict=True):
        found[i] = ids or found[i]
    return _begun(found, tokenizer)


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    answers: int = 1,
    invocation: Sequence[int] | None = None,
) -> list[Tokens]:
    """Token ids of each example.

    A prompt that is too long loses its beginning, all but the beginning-of-sequence token and ``invocation``, if that
    would be lost; a completion loses nothing.

    Args:
        examples: rendered examples.
        tokenizer: of the base model.
        max_length: longest example, in tokens.
        answers: this many examples in a row share their prompt, which is cut to the same length for all of them.
        invocation: tokens from whose last occurrence on the adapter speaks; ``None``: from the start.

    Raises:
        PrefixMemoryError: a completion alone is longer than ``max_length`` tokens.
    """
    prompts = encode_prompts([one.prompt for one in examples], tokenizer)
    wholes = _begun(_bare([one.prompt + one.completion for one in examples], tokenizer), tokenizer)
    head = _added_in_front(tokenizer) or [tokenizer.bos_token_id]
    found: list[Tokens] = []
    for start in range(0, len(examples), answers):
        group = range(start, start + answers)
        completions = [_answer(examples[i].completion, prompts[i], wholes[i], tokenizer) for i in group]
        longest = max(completions, key=len)
        room = max_length - len(longest)
        if room < 1:
            number = start + completions.index(longest)
            raise PrefixMemoryError(
                f"{examples[number].where or f'Row {number + 1}'}: the completion has {len(longest)} tokens, "
                f"max_length is {max_length}. Raise max_length or shorten the row."
            )
        prompt = prompts[start]
        cut = len(prompt) > room
        if cut:
            kept = len(head) if prompt[: len(head)] == head and len(head) <= room else 0
            shorter = prompt[:kept] + prompt[kept + len(prompt) - room :]
            fits = invocation and kept + len(invocation) < room
            if invocation and fits and begins(shorter, invocation) is None and begins(prompt, invocation) is not None:
                shorter[kept : kept + len(invocation)] = invocation
            prompt = shorter
        found += [Tokens(prompt, completion, cut) for completion in completions]
    return found


def _answer(text: str, prompt: list[int], whole: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a completion: what follows ``prompt`` in the ids of the whole text."""
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    # A token of both: no answer to the prompt could begin with its second half. The next best is the completion as it
    # is behind a line break, where it has no mark of a new word either.
    before, behind = _bare(["\n", "\n" + text], tokenizer)
    return behind[len(before) :] if behind[: len(before)] == before else _bare([text], tokenizer)[0]


def _bare(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of each text, without anything that the tokenizer adds at the beginning or the end."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise PrefixMemoryError(
            f"A text holds {error.object[error.start]!r}, which is no character: it was no UTF-8 where it came from. "
            "Write it again."
        ) from error
    return cast(Any, tokenizer)(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _begun(rows: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """``rows`` behind what the tokenizer adds before a text."""
    front = _added_in_front(tokenizer)
    return [ids if ids[: len(front)] == front else front + ids for ids in rows]


def _added_in_front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text: a beginning-of-sequence token, or nothing."""
    (bare,), whole = _bare(["a"], tokenizer), cast(Any, tokenizer)("a")["input_ids"]
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])


def _before_a_word(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of prompts in front of a word, without the blanks that lead to it; none where letters would be lost, too."""
    if not prompts:
        return []
    texts, fast = [f"{prompt}a" for prompt in prompts], tokenizer.is_fast
    encoded: Any = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    found = []
    for i, (prompt, ids) in enumerate(zip(prompts, encoded["input_ids"], strict=True)):
        if fast:
            ends = [end for _, end in encoded["offset_mapping"][i]]
            kept = sum(end <= len(prompt.rstrip(" ")) for end in ends)
            lost = prompt[max(ends[:kept], default=0) :]
        else:  # the longest beginning of the tokens that is a beginning of the text
            written: Any = tokenizer.decode(_bare([prompt], tokenizer)[0])
            shorter: list[Any] = [tokenizer.decode(ids[:length]) for length in range(len(ids))]
            kept = max(length for length, text in enumerate(shorter) if written.rstrip(" ").startswith(text))
            lost = written[len(shorter[kept]) :]
        found.append([] if lost.strip() else ids[:kept])
    return found
