"""Examples to tensors."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.rows.rows import Example

IGNORED = -100  # label of positions that do not count in the loss


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt, in training and in answering alike: one beginning-of-sequence token, never two.

    Chat templates write the special tokens themselves.
    """
    special = tokenizer.bos_token is not None and not prompt.startswith(str(tokenizer.bos_token))
    return list(tokenizer(prompt, add_special_tokens=special)["input_ids"])


def tokenize(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, list[int]]]:
    """``input_ids`` and ``labels`` of each example; the loss counts the completion only.

    A prompt that is too long loses its beginning, never the completion.

    Raises:
        PrefixMemoryError: a completion alone is longer than ``max_length`` tokens.
    """
    features = []
    for number, example in enumerate(examples, start=1):
        prompt = encode_prompt(example.prompt, tokenizer)
        completion = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
        room = max_length - len(completion)
        if room < 1:
            raise PrefixMemoryError(
                f"{example.where or f'Row {number}'}: the completion has {len(completion)} tokens, max_length is "
                f"{max_length}. Raise max_length or shorten the row."
            )
        prompt = prompt[-room:]
        features.append({"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion})
    return features


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
