"""Long input: how much of an adapter's accuracy is left as unrelated text precedes the question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from prefixmemory.analysis.inputs import longest_input
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.rows.encoding import encode_prompt
from prefixmemory.rows.rendering import render
from prefixmemory.rows.rows import Rows, checked
from prefixmemory.rows.unrelated_text import SEAM, context_tokens, unrelated_text
from prefixmemory.scoring.generation import accuracy, answers

DEFINITION = (
    "percentage of rows whose generated label is exactly theirs, behind this many tokens of unrelated text; the base "
    "model reads the same prompts"
)
#: Tokens of unrelated text, where nothing else is asked for.
LENGTHS = (0, 256, 1024, 4000)
#: Tokens of an answer: as many, or what the longest label needs.
ANSWER = 16
#: A batch keeps the keys and values of this many tokens at most.
BATCH_TOKENS = 16_384


@dataclass(frozen=True)
class LongInput:
    """What :func:`long_input` measured.

    Attributes:
        definition: of the figures, in words.
        rows: number of rows that were answered.
        lengths: tokens of unrelated text before the rows.
        accuracy: one a length, in percent, with the adapter.
        base_accuracy: one a length, in percent, of the base model.
    """

    definition: str
    rows: int
    lengths: list[int]
    accuracy: list[float]
    base_accuracy: list[float]


def long_input(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    lengths: Sequence[int] | None = None,
    file: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> LongInput:
    """Answer the same rows behind unrelated text of several lengths, with the active adapter and without.

    Args:
        model: a base model with an adapter of any PEFT method.
        tokenizer: of the base model.
        rows: with ``text`` and ``label``.
        lengths: tokens of unrelated text; ``None``: 0, 256, 1,024 and 4,000, cut to what model and text allow.
        file: a UTF-8 text; ``None``: the essay that ships with the package.
        progress: called with a number of rows, each time that this many more were answered.

    Raises:
        PrefixMemoryError: there is no adapter, rows have no label, or a length is more than the model reads or the
            text has.
    """
    if not isinstance(model, PeftModel):
        raise PrefixMemoryError(f"{type(model).__name__} has no adapter to look at. Load one with load_adapter.")
    for number, row in enumerate(rows, start=1):
        if "text" not in row or "label" not in row:
            raise PrefixMemoryError(
                f"{getattr(row, 'where', '') or f'Row {number}'}: has {sorted(row)}. Accuracy behind a long input "
                "needs rows with 'text' and 'label'."
            )
    if not rows:
        raise PrefixMemoryError("There are no rows to answer. Give some with 'text' and 'label'.")
    rows = checked(rows)
    examples = render(rows, tokenizer)
    prompts, labels = [example.prompt for example in examples], [row["label"] for row in rows]
    most = max(ANSWER, *(len(encode_prompt(example.completion, tokenizer)) for example in examples))
    longest = max(len(encode_prompt(prompt, tokenizer)) for prompt in prompts) + most
    texts = {n: unrelated_text(tokenizer, n, file) for n in _lengths(model, tokenizer, lengths, longest, file)}

    def right(text: str) -> float:
        taken = longest + (len(encode_prompt(text, tokenizer)) if text else 0)
        batch = max(1, min(50, BATCH_TOKENS // taken))
        found = answers(model, tokenizer, prompts, most, batch, context=text, progress=progress)
        return accuracy(found, labels)

    adapted = [right(text) for text in texts.values()]
    with model.disable_adapter():
        base = [right(text) for text in texts.values()]
    return LongInput(DEFINITION, len(rows), list(texts), adapted, base)


def _lengths(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[int] | None,
    longest: int,
    file: Path | None,
) -> list[int]:
    """The lengths, rising; each must leave room for ``longest``, the tokens of a prompt and its answer."""
    limit = longest_input(model)
    room = limit - longest - SEAM
    if room < 0:
        raise PrefixMemoryError(
            f"The longest prompt and its answer have {longest:,} tokens where the model reads at most {limit:,}. Give "
            "shorter rows."
        )
    if asked is None:
        most = min(room, context_tokens(tokenizer, file))
        return sorted({min(n, most) for n in LENGTHS})
    for n in asked:
        if n > room:
            raise PrefixMemoryError(
                f"{n:,} tokens in front, and {longest:,} of the longest prompt and its answer, are more than the "
                f"{limit:,} that the model reads. Ask for {room:,} at most."
            )
    if not asked:
        raise PrefixMemoryError("There is no length to measure at. Give some, such as 0 and 256.")
    return sorted(set(asked))
