"""What is to be trained, on what, and how: everything that a run is told, and its rows as tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from peft import PeftConfig
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.rows.encoding import Tokens, begins, encode_prompt, speaks_from, tokenize
from prefixmemory.rows.invocation import check_invoked, invocation_of, invocation_tokens, occurrences, questions, settle
from prefixmemory.rows.rendering import Example, render
from prefixmemory.rows.rows import Row, Rows, answers_a_row, check_objective, kind_of, with_one_answer
from prefixmemory.rows.unrelated_text import SEAM
from prefixmemory.training.recipe import Recipe
from prefixmemory.training.settings import TrainingSettings


@dataclass(frozen=True, eq=False)
class TrainingJob:
    """An adapter to be trained.

    Args:
        base_model: what the adapter's config names as its base model.
        tokenizer: of the base model.
        rows: training rows.
        config: PEFT config of the adapter; the job has a copy, which is given the tokens that it names.
        settings: how to train.
        validation: rows for the validation loss.
        data: names of the data, for the record.
        report_to: trackers that receive the metrics.
        quantization: how the base model is quantised when it is loaded, for the record.

    Raises:
        PrefixMemoryError: rows that the objective cannot be trained on, or in which a memory cannot be told from where
            it speaks.
    """

    base_model: str
    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    config: PeftConfig
    settings: TrainingSettings = field(default_factory=TrainingSettings)
    validation: Rows = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    report_to: Sequence[str] = ()
    quantization: str | None = None

    def __post_init__(self) -> None:
        if self.settings.keeps_best and not self.validation:
            raise PrefixMemoryError("keep_best and patience go by the validation loss: give validation rows.")
        for rows in (self.rows, self.validation):
            if rows:
                check_objective(self.settings.objective, rows)
        config = copy.deepcopy(self.config)  # one config serves several jobs
        settle(config, self.tokenizer, [*self.rows, *self.validation])
        object.__setattr__(self, "config", config)

    @cached_property
    def tokens(self) -> list[Tokens]:
        """The training rows, without distractors; those with several answers once for each.

        Raises:
            PrefixMemoryError: an answer does not fit into ``max_length``, or a row cannot be rendered.
        """
        return self._tokens(self.rows)

    @cached_property
    def validation_tokens(self) -> list[Tokens]:
        """The same of the validation rows."""
        return self._tokens(self.validation)

    def tokens_of(self, epoch: int) -> list[Tokens]:
        """The training rows as an epoch reads them, a share of them behind distractors, where the settings ask for it.

        Raises:
            PrefixMemoryError: there is too little text to draw them from.
        """
        front = self.settings.distractors
        if front is None:
            return self.tokens
        limits = self.tokenizer, self.settings.max_length, self._answers(self.rows)
        behind = front.in_front(self._examples(self.rows), self.tokens, *limits, self.settings.seed, epoch)
        return self._checked(tokenize(behind, *limits, self.invocation), behind)

    def _answers(self, rows: Rows) -> int:
        """How many examples in a row share their prompt."""
        return 1 if self.settings.objective == "sft" else answers_a_row(rows)

    def _examples(self, rows: Rows) -> list[Example]:
        return render(rows if self.settings.objective == "sft" else with_one_answer(rows), self.tokenizer)

    def _tokens(self, rows: Rows) -> list[Tokens]:
        examples = self._examples(rows)
        limits = self.tokenizer, self.settings.max_length, self._answers(rows), self.invocation
        return self._checked(tokenize(examples, *limits), examples)

    def _checked(self, found: list[Tokens], examples: list[Example]) -> list[Tokens]:
        if (invocation := self.invocation) is not None:
            check_invoked(found, invocation, [one.where for one in examples])
        return found

    @property
    def invocation(self) -> list[int] | None:
        """The tokens from which on the adapter speaks; ``None``: from the start."""
        return invocation_of(self.config)

    @cached_property
    def rows_cut(self) -> int:
        """How many rows, validation included, lose the beginning of their prompt."""
        return sum(
            tokens.cut
            for rows, found in ((self.rows, self.tokens), (self.validation, self.validation_tokens))
            for tokens in found[:: len(found) // max(len(rows), 1) or 1]
        )

    @property
    def cut_message(self) -> str:
        """The line that says so; empty where no row is cut."""
        if not self.rows_cut:
            return ""
        return (
            f"{self.rows_cut:,} rows are longer than max_length={self.settings.max_length} and lose the beginning of "
            "their prompt, system message included."
        )

    @cached_property
    def invoked_again(self) -> tuple[int, int]:
        """In how many training rows the question brings the tokens that introduce questions, and how many answers move
        where the adapter speaks, since they bring those of the invocation."""
        invocation = self.invocation
        if invocation is None:
            return 0, 0
        rows = self.rows if self.settings.objective == "sft" else with_one_answer(self.rows)
        again = 0
        for row, tokens in list(zip(rows, self.tokens, strict=True))[:: self._answers(self.rows)]:
            if self._speaks_from_question:
                whole = tokens.prompt
                if tokens.cut:  # what it lost may be the template's own
                    whole = encode_prompt(render([row], self.tokenizer)[0].prompt, self.tokenizer)
                again += occurrences(whole, invocation) > questions(row)
        return again, sum(begins(one.prompt, invocation) != self.speaks_from(one) for one in self.tokens)

    def speaks_from(self, row: Tokens) -> int | None:
        """The number of the token of ``row`` from which on the adapter speaks in training; ``None``: nowhere."""
        invocation = self.invocation or []
        if self.settings.objective == "sft":
            return speaks_from(row.prompt, row.completion, invocation)
        return begins(row.prompt + row.completion, invocation)  # TRL gives the model the row without its place

    @cached_property
    def _speaks_from_question(self) -> bool:
        """Whether the invocation is what introduces questions: other tokens may stand in a template anywhere."""
        kind = "text" if kind_of(self.rows[0]) == "text" else None
        try:
            return self.invocation == invocation_tokens("question", self.tokenizer, kind)
        except PrefixMemoryError:
            return False

    @property
    def invoked_again_messages(self) -> list[str]:
        """The lines that say so."""
        written = repr(self.tokenizer.decode(self.invocation or []))
        (asked, answered), found = self.invoked_again, []
        if asked:
            found.append(
                f"Rows whose question brings {written} of its own: {asked:,}. The adapter speaks from the last one on, "
                "and the base model alone reads what is in front."
            )
        if answered:
            why = "their prompts do not"
            if self.settings.objective != "sft":
                why = "in use it speaks from the prompt's, if that has them"
            found.append(
                f"Answers that bring {written}: {answered:,}. In training the adapter speaks from there on; {why}. "
                "Leave such rows out, or use other tokens of invocation."
            )
        return found

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row; with distractors, those that it may have in some epoch."""
        front = self.settings.distractors
        trained, validated = (max(map(len, part), default=0) for part in (self.tokens, self.validation_tokens))
        if front is not None:
            trained = min(trained + front.tokens + SEAM, self.settings.max_length)
        return max(trained, validated)

    def check_context(self, config: PretrainedConfig) -> None:
        """Refuse rows that are longer than the base model of ``config`` can read."""
        limit = getattr(config.get_text_config(), "max_position_embeddings", None) or self.longest
        if self.longest > limit:
            raise PrefixMemoryError(
                f"The longest row has {self.longest} tokens, and the base model reads {limit} at most. "
                f"Set max_length={limit}."
            )


def job_of(recipe: Recipe, base_model: str, tokenizer: PreTrainedTokenizerBase, rows: tuple[Rows, Rows]) -> TrainingJob:
    """What ``recipe`` says to train, on rows that :func:`rows_of` has read."""
    data = {name: value for name, value in asdict(recipe.data).items() if value is not None}
    return TrainingJob(
        base_model, tokenizer, rows[0], recipe.config(), recipe.training, rows[1], data, recipe.report_to,
        recipe.quantization,
    )  # fmt: skip


def rows_of(recipe: Recipe) -> tuple[list[Row], list[Row]]:
    """Training and validation rows of a recipe, every one checked, also for its objective."""
    seed = recipe.training.seed
    rows, validation = recipe.data.training_rows(seed), recipe.data.validation_rows(seed)
    for part in (rows, validation):
        if part:
            check_objective(recipe.training.objective, part)
    return rows, validation
