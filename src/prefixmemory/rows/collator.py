"""Token ids to batches."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixmemory.rows.encoding import IGNORED


class LeftPaddingCollator:
    """Pads on the left, so that completions end together and logits are needed for the last columns only.

    With ``crop_logits`` the batch asks the model for the logits of these columns (``logits_to_keep``), which saves
    most of the cost of the vocabulary projection when prompts are long. With ``right`` it pads on the right instead:
    for methods whose virtual tokens would stand before the padding, far from the text.
    """

    def __init__(self, pad_token_id: int, crop_logits: bool, right: bool = False) -> None:
        self.pad_token_id = pad_token_id
        self.crop_logits = crop_logits
        self.right = right

    def __call__(self, features: list[dict[str, list[int]]]) -> dict[str, Any]:
        """Batch with ``input_ids``, ``attention_mask``, ``position_ids`` ``[B, T]`` and ``labels`` ``[B, K]``."""
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
        return batch


def collator(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> LeftPaddingCollator:
    """The collator that suits ``model``."""
    # Methods that prepend virtual tokens prepend labels too, count on logits for all of them, and ignore position ids.
    prepends = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    base: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    crop_logits = not prepends and "logits_to_keep" in inspect.signature(base.forward).parameters
    return LeftPaddingCollator(padding_id(tokenizer), crop_logits, right=prepends)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with; without a padding token any will do, since padding is masked."""
    found = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return int(cast(int, found))
