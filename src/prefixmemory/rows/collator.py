"""Token ids to batches."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixmemory.rows.encoding import IGNORED, speaks_from
from prefixmemory.rows.invocation import ALORA, invocation_of


class LeftPaddingCollator:
    """Pads on the left, so that completions end together and logits are needed for the last columns only.

    With ``crop_logits`` the batch asks the model for the logits of these columns (``logits_to_keep``), which saves
    most of the cost of the vocabulary projection when prompts are long. With ``right`` it pads on the right instead:
    for methods whose virtual tokens would stand before the padding, far from the text.

    With ``invocation`` it says from which token on the adapter speaks, as in use: an answer that brings these tokens
    again does not move the place. A memory is told so by ``active``, PEFT's activated LoRA by ``alora_offsets``; in a
    row without these tokens it is silent, which ``strict`` leaves to the model to refuse.
    """

    def __init__(
        self, pad_token_id: int, crop_logits: bool, right: bool = False, invocation: Sequence[int] | None = None,
        is_lora: bool = False, strict: bool = False,
    ) -> None:  # fmt: skip
        self.pad_token_id = pad_token_id
        self.crop_logits = crop_logits
        self.right = right
        self.invocation = invocation
        self.is_lora = is_lora
        self.strict = strict

    def __call__(self, features: list[dict[str, list[int]]]) -> dict[str, Any]:
        """Batch with ``input_ids``, ``attention_mask``, ``position_ids`` ``[B, T]`` and ``labels`` ``[B, K]``; with an
        invocation that a row has, ``active`` ``[B]`` (or ``alora_offsets``, counted from the end)."""
        length = max(len(f["input_ids"]) for f in features)

        def padded(rows: list[list[int]], value: int) -> torch.Tensor:
            padding = [[value] * (length - len(row)) for row in rows]
            pairs = zip(rows, padding, strict=True) if self.right else zip(padding, rows, strict=True)
            return torch.tensor([first + second for first, second in pairs])

        mask = padded([[1] * len(f["input_ids"]) for f in features], 0)
        batch: dict[str, Any] = {
            "input_ids": padded([f["input_ids"] for f in features], self.pad_token_id),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
            "labels": padded([f["labels"] for f in features], IGNORED),
        }
        if self.crop_logits:
            # one column more than the longest completion: the logits that predict its first token
            keep = 1 + max(sum(label != IGNORED for label in f["labels"]) for f in features)
            keep = min(keep, length)
            batch["labels"] = batch["labels"][:, -keep:]
            batch["logits_to_keep"] = keep
        before = [_before_end(f, self.invocation) for f in features] if self.invocation else []
        if any(before) and (self.is_lora or 0 not in before or not self.strict):  # else the model says what is missing
            if self.is_lora:
                batch["alora_offsets"] = [offset or None for offset in before]
            else:
                batch["active"] = length - torch.tensor(before)
        return batch


def _before_end(feature: dict[str, list[int]], invocation: Sequence[int]) -> int:
    """How many tokens before its end an adapter begins to speak in a row; 0: nowhere."""
    ids, prompt = feature["input_ids"], len(list(takewhile(lambda label: label == IGNORED, feature["labels"])))
    place = speaks_from(ids[:prompt], ids[prompt:], invocation)
    return 0 if place is None else len(ids) - place


def collator(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> LeftPaddingCollator:
    """The collator that suits ``model``."""
    # Methods that prepend virtual tokens prepend labels too, count on logits for all of them, and ignore position ids.
    prepends = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    base: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    crop_logits = not prepends and "logits_to_keep" in inspect.signature(base.forward).parameters
    active = [model.peft_config[name] for name in model.active_adapters] if isinstance(model, PeftModel) else []
    invocations = {tuple(invocation_of(config) or ()) for config in active}
    invocation = invocations.pop() if len(invocations) == 1 else ()
    is_lora = bool(invocation) and hasattr(active[0], ALORA)
    strict = any(getattr(config, "strict_invocation", False) for config in active)
    return LeftPaddingCollator(padding_id(tokenizer), crop_logits, prepends, invocation or None, is_lora, strict)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with; without a padding token any will do, since padding is masked."""
    found = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return int(cast(int, found))
