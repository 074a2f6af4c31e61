"""Answers in the format that AlpacaEval reads, for users who have a judge."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from prefixmemory.rows.rendering import question_and_answer, render
from prefixmemory.rows.rows import Row, row_format, with_one_answer


def prompts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The rendered prompt of each row, for :func:`~prefixmemory.scoring.generation.answers`."""
    if row_format(rows) == "preference":
        rows = with_one_answer(rows)[::2]
    return [example.prompt for example in render(rows, tokenizer)]


def alpaca_eval(
    rows: Sequence[Row], answers: Sequence[str], generator: str, dataset: str = "prefixmemory"
) -> list[dict[str, str]]:
    """What ``alpaca_eval --model_outputs FILE.json`` reads: one object a row.

    Args:
        rows: what was asked; a conversation by its last question.
        answers: one per row.
        generator: name of the model.
        dataset: name of the rows, where they have no field ``dataset``, as AlpacaEval's own do.

    Raises:
        ValueError: not one answer per row.
    """
    return [
        {
            "instruction": _instruction(row),
            "output": answer,
            "generator": generator,
            "dataset": str(row.get("dataset", dataset)),
        }
        for row, answer in zip(rows, answers, strict=True)
    ]


def _instruction(row: Row) -> str:
    kind = row_format([row])
    if kind == "messages":
        return str(row["messages"][-2]["content"])
    if kind == "text":
        return str(row["text"])
    return str(row["prompt"]) if kind in ("preference", "judged") else question_and_answer(row)[0]
