"""The shift: how far an adapter moves the attention maps, by layer and head.

The maps are computed from the queries, keys and masks of both passes, for a sample of the queries, so that no backend
has to hand out attention weights. They are those of whole passes: a layer's map moves too when the adapter only
changed what earlier layers hand to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn

from prefixmemory._shapes import Float
from prefixmemory.analysis.inputs import check_ids, prefix_lengths, run
from prefixmemory.analysis.observe import Call, observe
from prefixmemory.errors import PrefixMemoryError

DEFINITION = (
    "Jensen-Shannon distance (root of the divergence in bits; 0: equal, 1: disjoint) of a head's attention map with "
    "the adapter and of the base model's in whole passes, mean over the sampled queries. distance: over the input's "
    "keys only, renormalised; with_prefix: with all prefix keys together as one more key, which the base model lacks"
)


@dataclass(frozen=True)
class Shift:
    """What :func:`shift` measured.

    Attributes:
        definition: of the figures, in words.
        layers: names of the attention modules.
        tokens: length of the input.
        queries: number of queries that were sampled, evenly over the input.
        distance: ``[layer][head]``, over the input's keys only.
        with_prefix: ``[layer][head]``, with the prefix as one more key; ``None`` if there is no prefix inside.
    """

    definition: str
    layers: list[str]
    tokens: int
    queries: int
    distance: list[list[float]]
    with_prefix: list[list[float]] | None


def shift(model: nn.Module, ids: Tensor, queries: int = 64) -> Shift:
    """Compare the attention maps with and without the active adapter.

    Args:
        model: a base model with an adapter of any PEFT method that leaves the number of tokens as it is.
        ids: tokens of a text, ``[rows, tokens]``.
        queries: number of queries to sample.

    Raises:
        PrefixMemoryError: there is no adapter, it adds tokens to the input, or the model does not use transformers'
            attention interface.
    """
    check_ids(model, ids)
    if not isinstance(model, PeftModel):
        raise PrefixMemoryError(f"{type(model).__name__} has no adapter to look at. Load one with load_adapter.")
    prefixes = prefix_lengths(model)
    config = model.active_peft_config
    if config.is_prompt_learning and not any(prefixes.values()):
        raise PrefixMemoryError(
            f"The method {config.peft_type.value} adds tokens to the input, so that its attention maps have no "
            "counterpart in the base model's. Look at a prefix, a memory, or a method that changes weights."
        )
    tokens = ids.shape[1]
    rows = torch.linspace(0, tokens - 1, min(queries, tokens)).round().long().unique()
    base: dict[str, Tensor] = {}
    found: dict[str, tuple[list[float], list[float]]] = {}

    def see_base(call: Call) -> None:
        base[call.name] = torch.softmax(call.scores(rows), dim=-1)

    def see_adapted(call: Call) -> None:
        p = prefixes[call.name]
        scores, before = call.scores(rows), base.pop(call.name)
        distance = js_distance(before, torch.softmax(scores[..., p:], dim=-1))
        beside = distance
        if p:
            after = torch.softmax(scores, dim=-1)
            one_key = torch.cat([after[..., :p].sum(dim=-1, keepdim=True), after[..., p:]], dim=-1)
            beside = js_distance(torch.nn.functional.pad(before, (1, 0)), one_key)
        found[call.name] = (distance.mean(dim=(0, 2)).tolist(), beside.mean(dim=(0, 2)).tolist())

    with model.disable_adapter(), observe(model, see_base):
        run(model, ids)
    with observe(model, see_adapted):
        run(model, ids)
    with_prefix = [beside for _, beside in found.values()] if any(prefixes.values()) else None
    return Shift(DEFINITION, list(found), tokens, len(rows), [own for own, _ in found.values()], with_prefix)


def js_distance(a: Float[Tensor, "*batch n"], b: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Jensen-Shannon distance of two distributions: the root of their divergence in bits, from 0 to 1."""
    a, b = a.double(), b.double()  # in float32, the root of a rounding error would show
    middle = (a + b) / 2
    divergence = (_relative(a, middle) + _relative(b, middle)) / 2
    return divergence.clamp(min=0).sqrt()


def _relative(a: Tensor, b: Tensor) -> Tensor:
    return (torch.xlogy(a, a) - torch.xlogy(a, b)).sum(dim=-1) / math.log(2)
