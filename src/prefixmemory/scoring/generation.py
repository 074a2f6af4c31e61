"""Answers of a model and their accuracy by exact match."""

from __future__ import annotations

import copy
import inspect
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixmemory.errors import PrefixMemoryError, check_number
from prefixmemory.models.logits import contiguous_logits_input
from prefixmemory.models.modes import evaluating
from prefixmemory.rows.chat_template import template_end, template_opening
from prefixmemory.rows.collator import padding_id
from prefixmemory.rows.encoding import Tokens, begins, behind, tokenize
from prefixmemory.rows.invocation import invocation_of
from prefixmemory.rows.rendering import Example
from prefixmemory.tuner.activation import activation, unfinished_text

Progress = Callable[[int], None]


#: A mark in an opening, such as ``</think>``.
_TAG = re.compile(r"<[^<>\s]+>")
#: How ids are read as an answer: some tokenizers would take blanks out of it.
AS_WRITTEN = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
#: ``generate`` follows what a model's ``generation_config.json`` says, unless it is told otherwise.
_LIKELIEST = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
}


@dataclass(frozen=True)
class Sampling:
    """How each token of an answer is chosen.

    Args:
        temperature: 0: always the likeliest token, whatever the model's own settings say of beams and penalties; above:
            drawn, the likelier ones less clearly preferred the higher.
        top_p: draw among the likeliest tokens only that make up this share; ``None``: as the model's own settings say.
        seed: of the draw; ``None``: another one each time.
    """

    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, 0.0, 100.0, "a number from 0 on")
        if self.top_p is not None:
            check_number("top_p", self.top_p, 1e-6, 1.0 + 1e-6, "a share in (0, 1]")
        if self.seed is not None:
            check_number("seed", self.seed, 0.0, 2.0**32, "a number from 0 to 2**32 - 1")
        for name in ("top_p", "seed"):
            if getattr(self, name) is not None and not self.temperature:
                raise PrefixMemoryError(f"{name}={getattr(self, name)} needs a temperature above 0: nothing is drawn.")

    def options(self) -> dict[str, Any]:
        """What ``generate`` is to be told; begins the draw anew where there is a seed."""
        if not self.temperature:
            return dict(_LIKELIEST)
        if self.seed is not None:
            torch.manual_seed(self.seed)
        share = {} if self.top_p is None else {"top_p": self.top_p}
        return {"do_sample": True, "temperature": self.temperature, **share}


GREEDY = Sampling()


def first_line(text: str) -> str:
    """What counts as the answer: the first line that is not empty, without surrounding blanks."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


class AnswersIn:
    """Reads ids that a model has written as its answer, without the end, and without what stands in front of answers by
    the chat template: a thought, the name of a channel, or words.

    A thought ends with the first mark that closes it, if the text begins with one; of channels the last counts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer
        opening = template_opening(tokenizer)
        self._opening, self._shown = self._ids(opening), self._text(self._ids(opening))
        tags = _TAG.findall(opening)
        mark = tags[-1] if tags and opening.endswith(tags[-1]) else ""
        self._closes = mark.startswith("</")
        if not self._closes and self._text(self._ids(mark)):
            mark = ""  # answers may have it: a word as any other
        self._mark, self._mark_ids = mark, self._ids(mark)
        self._begins = "" if opening == mark else tags[0] if tags else ""  # nothing: the prompt has begun the thought

    def __call__(self, written: Tensor) -> str:
        """The answer in the ids ``written``, without blanks around it."""
        ids = written.tolist()
        text = self._text(ids)
        if not self._mark:
            return text.removeprefix(self._shown).strip()
        if self._closes and not self._text(ids, skip_special_tokens=False).startswith(self._begins):
            return text
        found = [place for place in range(len(ids)) if ids[place : place + len(self._mark_ids)] == self._mark_ids]
        if found:
            return self._text(ids[found[0 if self._closes else -1] + len(self._mark_ids) :])
        front, mark, behind = text.partition(self._mark)  # it may have been written in other tokens
        return behind.strip() if mark else front

    @property
    def room(self) -> int:
        """Tokens that stand in front of an answer."""
        return len(self._opening)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _text(self, ids: list[int], **otherwise: bool) -> str:
        return str(self.tokenizer.decode(ids, **(AS_WRITTEN | otherwise))).strip()


def end_tokens(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: those of tokenizer, chat template and model, such as Gemma's ``<end_of_turn>``."""
    own = getattr(model.generation_config, "eos_token_id", None)
    end = template_end(tokenizer)
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    ids += [] if end is None else [tokenizer.convert_tokens_to_ids(end)]
    return sorted({int(i) for i in ids if i is not None})


def most_tokens(model: PreTrainedModel | PeftModel) -> int:
    """How many tokens a model reads at most; a large number where its config does not say."""
    return getattr(cast(Any, model).config.get_text_config(), "max_position_embeddings", None) or 10**9


def room_for_answer(model: PreTrainedModel | PeftModel, prompt: int, max_new_tokens: int) -> int:
    """How many tokens an answer may have behind ``prompt`` tokens: ``max_new_tokens``, or what the model has left.

    Raises:
        PrefixMemoryError: nothing is left, or more is asked for than the model reads at all.
    """
    reads = most_tokens(model)
    if max_new_tokens > reads:
        raise PrefixMemoryError(
            f"max_new_tokens={max_new_tokens} is out of range: the base model reads {reads:,} tokens at most, prompt "
            "and answer together."
        )
    if prompt >= reads:
        raise PrefixMemoryError(
            f"The prompt has {prompt:,} tokens, and the base model reads {reads:,} at most. Shorten it; in a chat, "
            "/reset forgets what was said before."
        )
    return min(max_new_tokens, reads - prompt)


def check_uncut(model: PreTrainedModel | PeftModel, rows: Sequence[Tokens], context: str) -> None:
    """Refuse rows whose beginning was cut off to make them fit, where that is ``context``."""
    if context and any(row.cut for row in rows):
        raise PrefixMemoryError(
            f"The model reads {most_tokens(model):,} tokens at most, and a row is longer with the text in front of it. "
            "Put less in front."
        )


def longest_answer(answers: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest of these answers, and one for the end."""
    return 1 + max(len(tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]) for answer in answers)


@torch.inference_mode()
def answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int = 16,
    batch_size: int = 50,
    context: str = "",
    progress: Progress | None = None,
    one_line: bool = True,
    sampling: Sampling = GREEDY,
) -> list[str]:
    """Answers to ``prompts``, greedy ones unless ``sampling`` says otherwise.

    Args:
        model: base model or model with adapter.
        tokenizer: its tokenizer.
        prompts: full prompts; those that are too long for the model lose their beginning, as in training.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts per batch; they are sorted by length first.
        context: text that precedes every prompt; its keys and values are computed once.
        progress: called with the number of prompts done, after each batch.
        one_line: keep the first line that the model writes, not all of its answer.
        sampling: how tokens are chosen.

    Returns:
        One answer per prompt, in the order of ``prompts``.

    Raises:
        PrefixMemoryError: a prompt is longer than the model can read, with ``context`` and an answer.
    """
    with evaluating(model):
        device = next(model.parameters()).device
        asked = [Example(behind(context, prompt, tokenizer), "") for prompt in prompts]
        rows = tokenize(asked, tokenizer, max(most_tokens(model) - max_new_tokens, 1), invocation=invocation_in(model))
        check_uncut(model, rows, context)
        ids = [row.prompt for row in rows]
        pad, end, answer_in = padding_id(tokenizer), end_tokens(model, tokenizer), AnswersIn(tokenizer)
        writer: Any = model
        # Padding must not stand between virtual tokens and text: what all prompts begin with is read with the virtual
        # tokens, and the base model goes on from there.
        prepends = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
        shared_ids: list[int] = []
        shared = None
        if context or prepends:
            shared_ids = common_beginning(ids, invocation_in(model))
        if shared_ids:
            if prepends:
                writer = cast(PeftModel, model).get_base_model()
            ids = [row[len(shared_ids) :] for row in ids]
            shared = read_beginning(model, shared_ids)
            # ids of what is cached are not read
            shared_ids = [pad] * (shared.get_seq_length() - len(shared_ids)) + shared_ids
        context_ids = torch.tensor([shared_ids], dtype=torch.long, device=device)
        order = sorted(range(len(prompts)), key=lambda i: len(ids[i]))
        found: list[str] = [""] * len(prompts)
        how = sampling.options()  # once: a seed is one of all prompts
        while order:
            same_length = prepends and shared is None
            chosen = [i for i in order[:batch_size] if not same_length or len(ids[i]) == len(ids[order[0]])]
            order = order[len(chosen) :]
            batch = _left_padded([ids[i] for i in chosen], context_ids, pad, device)
            cache: dict[str, Any] = {}
            if shared is not None:
                cache["past_key_values"] = repeated(shared, len(chosen))
            with contiguous_logits_input(model):
                written = writer.generate(
                    **batch,
                    **cache,
                    max_new_tokens=max_new_tokens,
                    **how,
                    use_cache=True,  # the base model's config may say otherwise; a shared context needs it
                    pad_token_id=pad,
                    eos_token_id=end or None,
                )
            new = written[:, batch["input_ids"].shape[1] :]
            for i, text in zip(chosen, map(answer_in, new), strict=True):
                found[i] = first_line(text) if one_line else text
            if progress is not None:
                progress(len(chosen))
    return found


def common_beginning(prompts: list[list[int]], invocation: Sequence[int] | None = None) -> list[int]:
    """The ids with which all prompts begin, short of the last one of any, and of all from which on an adapter speaks:
    the last occurrence of ``invocation`` in each."""
    shared = list(os.path.commonprefix([row[:-1] for row in prompts]))  # noqa: RUF071  # of lists of ids, too
    if invocation is None:
        return shared
    places = (begins(row, invocation) for row in prompts)
    return shared[: min((place for place in places if place is not None), default=len(shared))]


def invocation_in(model: PreTrainedModel | PeftModel) -> list[int] | None:
    """The tokens from which on the model's adapter speaks; ``None``: from the start, or there is none."""
    return invocation_of(model.active_peft_config) if isinstance(model, PeftModel) else None


def read_beginning(model: PreTrainedModel | PeftModel, ids: list[int]) -> Any:
    """The cache of what all prompts begin with, of one row; ``None`` where they have nothing in common.

    An adapter that waits for its invocation is silent on all of it, whatever invocations there are: the last one
    counts, which comes behind (see :func:`common_beginning`).
    """
    if not ids:
        return None
    read = torch.tensor([ids], device=next(model.parameters()).device)
    with unfinished_text(), _silent(model, len(ids)):
        return model(input_ids=read, use_cache=True, **_last_logits(model)).past_key_values


def _silent(model: PreTrainedModel | PeftModel, tokens: int) -> AbstractContextManager[Any]:
    """Have an adapter that waits for its invocation wait for as many tokens."""
    if invocation_in(model) is None:
        return nullcontext()
    adapted = cast(PeftModel, model)
    is_memory = hasattr(adapted.active_peft_config, "invocation_tokens")  # else PEFT's activated LoRA
    return activation([tokens]) if is_memory else adapted.disable_adapter()


def repeated(cache: Any, rows: int) -> Any:
    """A copy of the cache of one row, for ``rows``."""
    copied = copy.deepcopy(cache)
    copied.batch_repeat_interleave(rows)
    return copied


def _last_logits(model: PreTrainedModel | PeftModel) -> dict[str, int]:
    """The option that spares the logits of a long text, where the model has it."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}


def _left_padded(rows: list[list[int]], context_ids: Tensor, pad: int, device: torch.device) -> dict[str, Tensor]:
    """``[context | padding | prompt]`` for each row: a shared cache needs the context to stand first."""
    length = max(len(row) for row in rows)
    prompt = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    context = context_ids.expand(len(rows), -1)
    return {
        "input_ids": torch.cat([context, prompt], dim=1),
        "attention_mask": torch.cat([torch.ones_like(context), mask], dim=1),
    }


def is_same(answer: str, expected: str) -> bool:
    """Whether two texts are the same to the letter, however accents are encoded: many tokenizers change that."""
    return unicodedata.normalize("NFC", answer) == unicodedata.normalize("NFC", expected)


def accuracy(answers: list[str], expected: list[str]) -> float:
    """Percentage of answers that equal what was expected, to the letter."""
    return 100.0 * sum(is_same(a, e) for a, e in zip(answers, expected, strict=True)) / len(expected)
