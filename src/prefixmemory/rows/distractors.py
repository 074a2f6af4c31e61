"""Unrelated text in front of training rows, so that what is learned also holds behind a long input."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from pydantic import ConfigDict
from transformers import PreTrainedTokenizerBase

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.rows.encoding import Tokens, behind
from prefixmemory.rows.rendering import Example
from prefixmemory.rows.unrelated_text import ESSAY, SEAM, read_context

#: Short passages of many kinds, written for this package: about 1,900 tokens of SmolLM2. Tests never see them.
NOTES = Path(str(files("prefixmemory") / "data" / "notes.txt"))


@dataclass(frozen=True)
class Distractors:
    """Unrelated text in front of a share of the training rows: ``distractors:`` in a recipe's ``training:``.

    The run's seed draws the rows and a passage of the text for each, anew in every epoch, so that a row may be met
    both ways; the pairs of preference objectives keep theirs. Validation rows stay as they are.

    Args:
        share: of the rows, in (0, 1].
        tokens: of the longest passage; lengths are drawn evenly from 1 on. A row that would be longer than
            ``max_length`` gets a shorter one, or none.
        file: a UTF-8 text to draw from; ``None``: notes that ship with the package. It must have nothing in common with
            texts that tests put in front.
    """

    share: float = 0.5
    tokens: int = 240
    file: str | None = None
    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise PrefixMemoryError(f"distractors.share={self.share} is out of range: give a share in (0, 1].")
        if self.tokens < 1:
            raise PrefixMemoryError(f"distractors.tokens={self.tokens} is out of range: give a number above 0.")

    def text(self) -> str:
        """What passages are drawn from.

        Raises:
            PrefixMemoryError: it cannot be read, is empty, or is the essay that tests put in front.
        """
        text = read_context(NOTES if self.file is None else Path(self.file).expanduser())
        if text.strip() == read_context(ESSAY).strip():
            raise PrefixMemoryError(
                f"distractors.file={self.file!r} is the essay that tests put in front. Train on another text."
            )
        return text

    def checksum(self) -> str:
        """Of the text."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    def in_front(
        self,
        examples: Sequence[Example],
        tokens: Sequence[Tokens],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        answers: int,
        seed: int,
        epoch: int = 0,
    ) -> list[Example]:
        """``examples``, a share of them behind a passage.

        Args:
            examples: rendered training rows.
            tokens: the same, tokenized.
            tokenizer: of the base model.
            max_length: longest row, in tokens.
            answers: this many examples in a row share their prompt, and the passage.
            seed: of the draw.
            epoch: which each have a draw of their own.

        Raises:
            PrefixMemoryError: the text has fewer tokens than the longest passage.
        """
        ids: list[int] = tokenizer(self.text(), add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) < self.tokens:
            raise PrefixMemoryError(
                f"distractors.tokens={self.tokens}, and the text has {len(ids):,} tokens. Give fewer, or a longer file."
            )
        draw = random.Random(f"distractors {seed}" + (f" {epoch}" if epoch else ""))
        groups = range(0, len(examples), answers)
        found = list(examples)
        for start in draw.sample(groups, round(self.share * len(groups))):
            group = range(start, start + answers)
            length, place = draw.randint(1, self.tokens), draw.random()
            length = min(length, max_length - max(len(tokens[i]) for i in group) - SEAM)
            if length > 0:
                begin = int(place * (len(ids) - length + 1))
                passage = str(tokenizer.decode(ids[begin : begin + length], clean_up_tokenization_spaces=False))
                passage = passage.strip("\ufffd")  # a character of several tokens may have been cut
                for i in group:
                    found[i] = replace(found[i], prompt=behind(f"{passage}\n\n", found[i].prompt, tokenizer))
        return found
