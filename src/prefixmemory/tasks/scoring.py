"""How answers are scored: one function per kind of task, with a point per row, so that runs are compared in pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from statistics import fmean
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.rows.rendering import Example, render, right_answer
from prefixmemory.rows.rows import Row, row_format, with_one_answer
from prefixmemory.scoring.generation import AnswersIn, answers, first_line, is_same, longest_answer
from prefixmemory.scoring.likelihood import Likelihood, likelihoods, nats_a_token
from prefixmemory.tasks.metrics import (
    best,
    bleu,
    last_number,
    one_number,
    percent,
    rouge_l,
    squad_exact_match,
    squad_f1,
)
from prefixmemory.tasks.task import Task
from prefixmemory.training.settings import TrainingSettings

#: Tokens of an answer, where nothing says how long the right ones are.
ROOM = 32


@dataclass(frozen=True)
class Scored:
    """What a model reached on some rows.

    Attributes:
        score: the task's own figure; more is better.
        points: one per row.
        metrics: further figures by name, with their unit.
        answers: what the model wrote, one per row; empty where it wrote nothing.
        greedy: of a loss: whether greedy decoding would write the right answer, one per row.
    """

    score: float
    points: list[float]
    metrics: dict[str, float] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class _Asked:
    """A model and what it is asked."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    rows: list[Row]
    context: str
    max_new_tokens: int
    batch_size: int
    settings: TrainingSettings
    end: str | None

    def answers(self, one_line: bool = True) -> list[str]:
        prompts = [example.prompt for example in render(self.rows, self.tokenizer)]
        limits = self.max_new_tokens, self.batch_size, self.context
        return answers(self.model, self.tokenizer, prompts, *limits, one_line=one_line)

    def likelihoods(self, examples: list[Example]) -> list[Likelihood]:
        if self.end is not None:
            eos = str(self.tokenizer.eos_token)
            examples = [replace(one, completion=one.completion.removesuffix(eos) + self.end) for one in examples]
        return likelihoods(self.model, self.tokenizer, examples, self.batch_size, self.context)


def score(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: list[Row],
    context: str = "",
    max_new_tokens: int = ROOM,
    batch_size: int = 50,
    settings: TrainingSettings | None = None,
    end: str | None = None,
) -> Scored:
    """Score ``model`` on ``rows``.

    Args:
        model: base model or model with adapter.
        tokenizer: its tokenizer.
        task: says how.
        rows: test or validation rows of the task.
        context: text before every prompt.
        max_new_tokens: longest answer, where the task does not say.
        batch_size: prompts a batch.
        settings: how the model was trained, or would be; a preference is measured by what its objective defines.
            ``None``: as the task says.
        end: of likelihoods: what a right answer ends with; ``None``: the end token.
    """
    length = task.max_new_tokens or max_new_tokens
    asked = _Asked(model, tokenizer, rows, context, length, batch_size, settings or task.settings(), end)
    return SCORERS[task.scoring](asked)


def room_for_answers(task: Task, rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens answers to ``rows`` may have, where the task does not say: as many as the longest right one, and
    :data:`ROOM` at least where a right answer is no label."""
    if task.scoring in ("loss", "preference"):  # nothing is written
        return ROOM
    longest = longest_answer((text for row in rows for text in _right_answers(task.scoring, row)), tokenizer)
    return longest if row_format(rows) == "text" else max(longest + AnswersIn(tokenizer).room, ROOM)


def _right_answers(scoring: str, row: Row) -> list[str]:
    several = {"reading": "answers", "text": "references"}.get(scoring)
    return [right_answer(row)] if several is None else _references(row, several)


def _references(row: Row, field_name: str) -> list[str]:
    """All right answers of a row that has several in ``field_name``, else the one it has.

    Raises:
        PrefixMemoryError: the field holds anything but texts.
    """
    several = row.get(field_name)
    if several is None:
        return [right_answer(row)]
    if isinstance(several, Mapping):  # as in SQuAD's files
        several = several.get("text")
    if not isinstance(several, list) or not several or not all(isinstance(text, str) for text in several):
        raise PrefixMemoryError(f"{row.where}: {field_name!r} is {several!r}; it must be a list of texts.")
    return several


def _compared(said: list[str], references: list[list[str]]) -> list[str]:
    """What of each answer is compared: where all right ones are one line, what stands behind the first is no answer."""
    return [
        first_line(text) if all(len(one.strip().splitlines()) <= 1 for one in right) else text
        for text, right in zip(said, references, strict=True)
    ]


def _exact_match(asked: _Asked) -> Scored:
    """Percentage of answers whose first line is the right one, to the letter."""
    said = asked.answers()
    points = [100.0 * is_same(text, right_answer(row)) for text, row in zip(said, asked.rows, strict=True)]
    return Scored(fmean(points), points, {}, said)


def _number(asked: _Asked) -> Scored:
    """Percentage of answers whose result is the number in the row's ``answer``, else that of its completion."""
    expected = [_right_number(row) for row in asked.rows]
    said = asked.answers(one_line=False)
    points = [100.0 * (last_number(text) == right) for text, right in zip(said, expected, strict=True)]
    return Scored(fmean(points), points, {}, said)


def _right_number(row: Row) -> Fraction:
    given: Any = row.get("answer")
    text = right_answer(row) if given is None else str(given)
    found = last_number(text) if given is None else one_number(text)
    if found is None:
        what = "has no number" if given is None else "is no number"
        raise PrefixMemoryError(f"{row.where}: scoring='number', and the answer {text[-60:]!r} {what}.")
    return found


def _reading(asked: _Asked) -> Scored:
    """SQuAD's F1, in percent; the best of the row's ``answers`` where it has several."""
    references = [_references(row, "answers") for row in asked.rows]
    said = _compared(asked.answers(one_line=False), references)
    pairs = list(zip(said, references, strict=True))
    points = [100.0 * best(squad_f1, text, right) for text, right in pairs]
    exact = percent([best(squad_exact_match, text, right) for text, right in pairs])
    return Scored(fmean(points), points, {"exact match (%)": exact}, said)


def _text(asked: _Asked) -> Scored:
    """BLEU of all answers together, against all ``references`` of each row; the points are ROUGE-L, in percent."""
    references = [_references(row, "references") for row in asked.rows]
    said = _compared(asked.answers(one_line=False), references)
    points = [100.0 * value for value in rouge_l(said, references)]
    return Scored(bleu(said, references), points, {"ROUGE-L (%)": fmean(points)}, said)


def _loss(asked: _Asked) -> Scored:
    """Log-likelihood of the completions in nats per token: of all tokens together, and, as points, of each row."""
    found = asked.likelihoods(render(asked.rows, asked.tokenizer))
    loss = nats_a_token(found)
    greedy = [one.greedy for one in found]
    metrics = {"perplexity": math.exp(min(loss, 700.0)), "greedy match (%)": 100.0 * fmean(greedy)}
    return Scored(-loss, [one.per_token for one in found], metrics, greedy=greedy)


def _preference(asked: _Asked) -> Scored:
    """Percentage of pairs whose chosen answer the model prefers, by the reward that its objective defines.

    DPO and KTO define ``beta (log p(answer) - log p_base(answer))``, where the base model is the same model without its
    adapter; SimPO the mean log-likelihood of a token. A model without adapter has the first reward nowhere: it is
    scored by the second. Of equal rewards, each is preferred in half.
    """
    examples = render(with_one_answer(asked.rows), asked.tokenizer)
    found = asked.likelihoods(examples)
    by_likelihood = _margins([one.per_token for one in found])
    points = _preferred(by_likelihood)
    metrics = {
        "likelihood accuracy (%)": fmean(points),
        "likelihood margin (nats a token)": fmean(by_likelihood),
    }
    if isinstance(asked.model, PeftModel):
        with asked.model.disable_adapter():
            base = asked.likelihoods(examples)
        beta = asked.settings.reward_scale
        by_reward = _margins([beta * (one.nats - before.nats) for one, before in zip(found, base, strict=True)])
        preferred = _preferred(by_reward)
        metrics |= {
            "implicit reward accuracy (%)": fmean(preferred),
            "implicit reward margin (nats)": fmean(by_reward),
        }
        if asked.settings.objective != "simpo":
            points = preferred
    return Scored(fmean(points), points, metrics)


def _margins(values: Sequence[float]) -> list[float]:
    """Of chosen over rejected answers, which take turns."""
    return [chosen - rejected for chosen, rejected in zip(values[::2], values[1::2], strict=True)]


def _preferred(margins: Sequence[float]) -> list[float]:
    return [math.nan if math.isnan(m) else 100.0 if m > 0 else 50.0 if m == 0 else 0.0 for m in margins]


SCORERS: dict[str, Callable[[_Asked], Scored]] = {
    "exact_match": _exact_match,
    "number": _number,
    "reading": _reading,
    "text": _text,
    "loss": _loss,
    "preference": _preference,
}
