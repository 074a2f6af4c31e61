"""Running a model, with an adapter or without: its outputs, its loss, its greedy continuation, its padded rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .kinds import ARGUMENTS, LONG, SHORT, Batch, Kind

TOLERANCE = 1e-4  # of a logit
CACHE_TOLERANCE = 1e-3  # recurrent states are summed up in another order than whole sequences
NEW_TOKENS = 6


class Failed(Exception):
    """A check failed, and why."""


def reason(error: BaseException) -> str:
    """One short line."""
    line = " ".join(str(error).split())
    text = line if isinstance(error, Failed) else f"{type(error).__name__}: {line}".rstrip(": ")
    return text if len(text) <= 200 else text[:197] + "..."


def logits(model: nn.Module, batch: Batch, model_type: str) -> Tensor:
    """The model's main output: logits, else its last hidden state."""
    output = model(**batch, **ARGUMENTS.get(model_type, {}))
    found = output.get("logits")
    return output["last_hidden_state"] if found is None else found


def loss(model: nn.Module, batch: Batch, model_type: str) -> Tensor:
    """Cross-entropy against fixed random targets, so that every position and every kind of output has a say."""
    scores = logits(model, batch, model_type).flatten(0, -2)
    generator = torch.Generator().manual_seed(4)
    targets = torch.randint(scores.shape[-1], (scores.shape[0],), generator=generator)
    return nn.functional.cross_entropy(scores, targets)


def greedy(model: nn.Module, batch: Batch, model_type: str, positions: bool) -> tuple[Tensor, Tensor]:
    """Greedy continuation by whole forward passes, without cache and ``generate``: new tokens and their logits."""
    name = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    batch, all_scores = dict(batch), []
    for _ in range(NEW_TOKENS):
        if positions:
            batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        all_scores.append(logits(model, batch, model_type)[:, -1])
        batch[name] = torch.cat([batch[name], all_scores[-1].argmax(-1, keepdim=True)], dim=1)
        if name == "input_ids":
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch[name][:, -NEW_TOKENS:], torch.stack(all_scores)


def error(wanted: Tensor, got: Tensor) -> float:
    """Largest difference, as a share of the largest value where that is above 1."""
    return float((wanted - got).abs().max() / wanted.abs().max().clamp(min=1))


def padded(kind: Kind, config: Any, positions: bool) -> tuple[Batch, Batch, slice]:
    """A short row alone, the same row padded in a batch with a longer one, and where the row lies in that batch."""
    alone, batch = kind.inputs(config, 1, SHORT), kind.inputs(config, 2, LONG)
    place = slice(LONG - SHORT, LONG) if kind.padding == "left" else slice(0, SHORT)
    inputs, mask = batch["input_ids"].clone(), batch["attention_mask"].clone()
    inputs[0], mask[0] = 0, 0
    inputs[0, place], mask[0, place] = alone["input_ids"][0], 1
    batch |= {"input_ids": inputs, "attention_mask": mask}
    if "decoder_input_ids" in alone:
        batch["decoder_input_ids"] = torch.cat([alone["decoder_input_ids"], batch["decoder_input_ids"][1:]])
        place = slice(None)
    if positions:
        batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        alone["position_ids"] = torch.arange(SHORT)[None]
    return alone, batch, place


def padding_error(model: nn.Module, kind: Kind, config: Any, model_type: str, positions: bool) -> float:
    """The difference that padding makes to the logits of a row."""
    alone, batch, place = padded(kind, config, positions)
    a, b = logits(model, alone, model_type)[0], logits(model, batch, model_type)[0]
    return error(a, b[place] if a.ndim > 1 else b)


def compare_generate(model: nn.Module, kind: Kind, model_type: str, positions: bool) -> None:
    """Compare what ``generate`` makes with its cache, tokens and logits, with what forward passes make."""
    batch = kind.inputs(model.config, 2, LONG)
    made = model.generate(
        **batch, do_sample=False, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, output_logits=True
    )
    tokens, scores = greedy(model, batch, model_type, positions)
    off = [error(wanted, got) for wanted, got in zip(scores, made.logits, strict=True)]
    first = next((at for at, by in enumerate(off) if not by <= CACHE_TOLERANCE), None)
    if first is not None:
        raise Failed(f"logits of new token {first + 1} with cache differ by {off[first]:.1g}")
    if not torch.equal(made.sequences[:, -NEW_TOKENS:], tokens):
        raise Failed("generation with cache gives other tokens")
