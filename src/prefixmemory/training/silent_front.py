"""Training reads what stands in front of all invocations without gradients: nothing that learns has a part in it.

There a memory is silent and the model is the base model, so that keys and values depend on nothing that is trained.
They are computed as in generation, into a cache, and no activations are kept for the backward pass. Loss and gradients
are the same to rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from prefixmemory.rows.encoding import IGNORED
from prefixmemory.tuner.calls import thread
from prefixmemory.tuner.layers import memory_layers

#: A front of fewer columns, or of a smaller share of a batch, is not worth a second pass.
COLUMNS, SHARE = 32, 0.25


class SilentFront:
    """Reads the silent front of batches that a model is trained on.

    Args:
        model: what the Trainer calls; where it is no PEFT model with memories alone to train, or is sharded, nothing is
            done.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.layers = memory_layers(self.model) if isinstance(self.model, PeftModel) else []
        self.is_possible = bool(self.layers) and self._is_possible(cast(PeftModel, self.model))

    def _is_possible(self, model: PeftModel) -> bool:
        base: Any = model.get_base_model()
        takes = inspect.signature(base.forward).parameters
        ours = {id(p) for layer in self.layers for p in layer.parameters()}
        config = base.config.get_text_config()
        return (
            {"past_key_values", "use_cache", "position_ids"} <= takes.keys()
            and not base.config.is_encoder_decoder
            and not getattr(config, "output_router_logits", False)  # a loss of its own, over all tokens
            and all(id(p) in ours for p in model.parameters() if p.requires_grad)
            and not any(hasattr(part, "reshard") for part in model.modules())  # FSDP2
        )

    def read(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Compute keys and values of the silent front of ``batch``, without gradients.

        Args:
            batch: of the collator: ``input_ids``, ``attention_mask``, ``position_ids`` ``[B, T]``, ``labels``
                ``[B, K]`` of the last columns, ``active`` ``[B]``.

        Returns:
            For the same model: the last T − C columns of ids, positions and labels, the whole attention mask, and the C
            columns of the front as ``past_key_values``; ``batch`` itself where C would be too small.
        """
        columns = self._columns(batch) if self.is_possible else 0
        if not columns:
            return batch
        front = {name: batch[name][:, :columns] for name in ("input_ids", "attention_mask", "position_ids")}
        keep = {"logits_to_keep": 1} if "logits_to_keep" in batch else {}
        silent = torch.zeros_like(front["input_ids"], dtype=torch.bool)  # earlier questions are not the last one
        with torch.no_grad():
            cache = self.model(**front, **keep, active=silent, use_cache=True).past_key_values
        if not _is_plain(cache):  # recurrent states and the like are written in place
            self.is_possible = False
            return batch
        labels = batch["labels"]
        return {
            **batch,
            "input_ids": batch["input_ids"][:, columns:],
            "position_ids": batch["position_ids"][:, columns:],
            "labels": labels[:, -(batch["input_ids"].shape[1] - columns) :],
            "past_key_values": cache,
        }

    def _columns(self, batch: Mapping[str, Any]) -> int:
        """How many columns of ``batch`` are silent in all rows; 0: too few."""
        if any(layer.first_batch is not None for layer in self.layers):
            return 0  # which takes the means of features
        places, is_off = batch.get("active"), all(layer.plan(None) is None for layer in self.layers)
        if places is None or places.ndim != 1 or thread.given is not None or is_off:
            return 0
        length, labels = batch["input_ids"].shape[1], batch["labels"]
        counted = (labels != IGNORED).any(dim=0).int().argmax()  # the first column of labels that any row has
        predicts = counted + (length - labels.shape[1] - 1)
        columns = min(int(torch.minimum(places.min(), predicts)), length - 1)
        return columns if columns >= max(COLUMNS, SHARE * length) else 0


def _is_plain(cache: Any) -> bool:
    """Whether ``cache`` holds keys and values alone, to which new ones are appended, not written in place."""
    layers = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and all(type(layer) in layers for layer in cache.layers)
