"""How likely a model finds completions: the measure behind losses, perplexities and preferences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixmemory.models.logits import contiguous_logits_input
from prefixmemory.models.modes import evaluating
from prefixmemory.rows.collator import collator
from prefixmemory.rows.encoding import IGNORED, Tokens, behind, tokenize
from prefixmemory.rows.rendering import Example
from prefixmemory.scoring.generation import (
    Progress,
    check_uncut,
    common_beginning,
    invocation_in,
    most_tokens,
    read_beginning,
    repeated,
)

#: Logits of this many tokens are held at once, beside those of one long row.
TOKENS_A_BATCH = 2048
#: Each row of a batch has a copy of the cache of what all rows begin with: they hold this many tokens together.
CACHED_TOKENS = 32_768


@dataclass(frozen=True)
class Likelihood:
    """Of one completion.

    Attributes:
        nats: sum of the log-probabilities of its tokens.
        tokens: how many there are.
        cut: whether its prompt lost its beginning.
        greedy: whether each of its tokens is the model's first choice, so that greedy decoding would write it.
    """

    nats: float
    tokens: int
    cut: bool = False
    greedy: bool = False

    @property
    def per_token(self) -> float:
        """Mean log-probability of a token, in nats."""
        return self.nats / self.tokens


@torch.inference_mode()
def likelihoods(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int = 8,
    context: str = "",
    progress: Progress | None = None,
) -> list[Likelihood]:
    """Log-likelihood of the examples' completions, each after its prompt.

    Args:
        model: base model or model with adapter.
        tokenizer: its tokenizer.
        examples: rendered rows; prompts that are too long for the model lose their beginning.
        batch_size: examples a batch at most; they are sorted by length first.
        context: text that precedes every prompt; its keys and values are computed once.
        progress: called with the number of examples done, after each batch.

    Returns:
        One an example, in the order of ``examples``.

    Raises:
        PrefixMemoryError: a completion alone is longer than the model can read, or a row with ``context``.
    """
    with evaluating(model):
        invocation = invocation_in(model)
        whole = [replace(one, prompt=behind(context, one.prompt, tokenizer)) for one in examples]
        rows = tokenize(whole, tokenizer, most_tokens(model), invocation=invocation)
        check_uncut(model, rows, context)
        prepends = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
        shared = common_beginning([one.prompt for one in rows], invocation) if context else []
        cache, length = read_beginning(model, shared), len(shared)
        reader: Any = model
        if prepends and cache is not None:  # virtual tokens are in the cache: the base model goes on from there
            reader = cast(PeftModel, model).get_base_model()
        cached = 0 if cache is None else cache.get_seq_length()
        collate = collator(reader, tokenizer)
        batch_size = max(1, min(batch_size, CACHED_TOKENS // max(length, 1)))
        rows = [replace(one, prompt=one.prompt[length:]) for one in rows]
        device = next(model.parameters()).device
        found = [Likelihood(0.0, 0)] * len(rows)
        for chosen in _batches(rows, batch_size, collate.crop_logits):
            batch = collate([rows[i].feature for i in chosen])
            batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            labels = batch.pop("labels")[:, 1:]
            if cache is not None:
                batch["past_key_values"] = repeated(cache, len(chosen))
                batch["position_ids"] = batch["position_ids"] + cached
                batch["attention_mask"] = pad(batch["attention_mask"], (cached, 0), value=1)
                if "active" in batch:
                    batch["active"] = batch["active"] + cached
            with contiguous_logits_input(model):
                logits = reader(**batch).logits[:, -labels.shape[1] - 1 : -1].float()
            losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
            nats = -losses.view(labels.shape).sum(1)
            greedy = ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1)
            for i, value, first in zip(chosen, nats.tolist(), greedy.tolist(), strict=True):
                found[i] = Likelihood(value, len(rows[i].completion), rows[i].cut, first)
            if progress is not None:
                progress(len(chosen))
    return found


def _batches(rows: Sequence[Tokens], batch_size: int, crop_logits: bool) -> Iterator[list[int]]:
    """Indices of the examples of each batch, by rising length."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))

    def logits(i: int) -> int:
        return len(rows[i].completion) if crop_logits else len(rows[i])

    batch: list[int] = []
    for i in order:
        longest = max(logits(j) for j in [*batch, i])
        if batch and (len(batch) == batch_size or longest * (len(batch) + 1) > TOKENS_A_BATCH):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def nats_a_token(found: Sequence[Likelihood]) -> float:
    """Mean negative log-likelihood of all tokens: the loss that training minimises."""
    return -sum(one.nats for one in found) / sum(one.tokens for one in found)
