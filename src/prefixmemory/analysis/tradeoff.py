"""The trade-off: how much of a head's answer is the adapter's, against the length of the input.

A prefix inside the softmax takes its share α of attention from the input, and the longer the input, the less is
left for it. A memory outside adds to what attention answers; the same question is then how large the addition is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from prefixmemory._shapes import Float
from prefixmemory.analysis.inputs import check_ids, prefix_lengths, run, text_sites
from prefixmemory.analysis.observe import Call, observe
from prefixmemory.attention.sites import AttentionSite
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.memories.registry import is_inside
from prefixmemory.tuner.layers import attention_layers

DEFINITIONS = {
    "share": "α: share of a head's attention that goes to the prefix's keys, mean over the last queries of the input",
    "ratio": "‖added‖ / ‖attention output‖ of a head, before the output projection, mean over the last queries of the "
    "input",
}


@dataclass(frozen=True)
class Tradeoff:
    """What :func:`tradeoff` measured.

    Attributes:
        quantity: ``share`` (a prefix inside the softmax) or ``ratio`` (a memory outside).
        definition: what that is, in words.
        prefix_length: number of prefix keys; ``None`` for a memory.
        layers: names of the attention modules.
        lengths: lengths of the input, in tokens.
        queries: the mean was taken over this many last queries of each input (all, in a shorter one).
        values: ``[length][layer][head]``.
    """

    quantity: Literal["share", "ratio"]
    definition: str
    prefix_length: int | None
    layers: list[str]
    lengths: list[int]
    queries: int
    values: list[list[list[float]]]


def tradeoff(model: nn.Module, ids: Tensor, lengths: Sequence[int], queries: int = 8) -> Tradeoff:
    """Measure the trade-off for inputs of several lengths, the beginnings of ``ids``.

    Args:
        model: a model with one of our adapters, or with PEFT's prefix tuning.
        ids: tokens of a text, ``[1, tokens]``.
        lengths: of the inputs, in tokens; one pass each.
        queries: number of last queries to take the mean over.

    Raises:
        PrefixMemoryError: the adapter is neither prefix nor memory, a length is out of range, or the model does not
            use transformers' attention interface (inside the softmax only).
    """
    check_ids(model, ids)
    for length in lengths:
        if not 1 <= length <= ids.shape[1]:
            raise PrefixMemoryError(
                f"lengths has {length}, and the text has {ids.shape[1]:,} tokens: give lengths from 1 to that."
            )
    prefixes = prefix_lengths(model)
    inside = {name: length for name, length in prefixes.items() if length}
    outside = _memories(model)
    if not inside and not outside:
        method = model.active_peft_config.peft_type.value if isinstance(model, PeftModel) else "none"
        raise PrefixMemoryError(
            f"The trade-off is that of a prefix or a memory with the input; this adapter (method {method}) holds "
            "neither, or its scale is 0. Look at its spectrum instead."
        )
    names = list(inside or outside)
    values = []
    for length in lengths:
        rows = torch.arange(max(0, length - queries), length)
        found: dict[str, list[float]] = {}
        with shares(model, inside, rows, found) if inside else added(outside, rows, found, kept_shares(model)):
            run(model, ids[:, :length])
        values.append([found[name] for name in names])
    quantity: Literal["share", "ratio"] = "share" if inside else "ratio"
    longest = max(inside.values()) if inside else None
    return Tradeoff(quantity, DEFINITIONS[quantity], longest, names, list(lengths), queries, values)


def prefix_share(call: Call, prefix: int, rows: Tensor) -> Float[Tensor, "b h s"]:
    """α of the first ``prefix`` keys, for the queries ``rows``."""
    scores = call.scores(rows)
    return torch.exp(torch.logsumexp(scores[..., :prefix], dim=-1) - torch.logsumexp(scores, dim=-1))


@contextmanager
def shares(model: nn.Module, prefixes: dict[str, int], rows: Tensor, found: dict[str, list[float]]) -> Iterator[None]:
    """Write into ``found`` the mean α of every head, by attention module, of the pass in the block."""

    def see(call: Call) -> None:
        if call.name in prefixes:
            found[call.name] = prefix_share(call, prefixes[call.name], rows).mean(dim=(0, 2)).tolist()

    with observe(model, see):
        yield


def _memories(model: nn.Module) -> dict[str, AttentionSite]:
    """The attention modules in which an active memory adds something."""
    layers = {id(layer.site.module): layer for layer in attention_layers(model)}
    return {
        name: site
        for name, site in text_sites(model).items()
        if (layer := layers.get(id(site.module))) is not None
        and any(not is_inside(layer.memory(adapter)) for adapter in layer.answering())
    }


@torch.no_grad()
def kept_shares(model: nn.Module) -> dict[str, Tensor]:
    """What memories that are mixed with the heads' own outputs leave of these, ``[heads, 1]``: λ, at a scale of 1; by
    attention module."""
    found: dict[str, Tensor] = {}
    names = {id(site.module): name for name, site in text_sites(model).items()}
    for layer in attention_layers(model):
        for adapter in layer.answering():
            if adapter in layer.prefix_memory_mixing:
                one, mixing = torch.ones(layer.site.heads, 1), copy.deepcopy(layer.prefix_memory_mixing[adapter]).cpu()
                name = names[id(layer.site.module)]
                found[name] = found.get(name, one) + layer.scale[adapter] * mixing(torch.zeros_like(one), one)
    return found


@contextmanager
def added(
    sites: dict[str, AttentionSite], rows: Tensor, found: dict[str, list[float]], kept: Mapping[str, Tensor]
) -> Iterator[None]:
    """Write into ``found`` the mean of ‖added‖ / ‖attention output‖ of every head, of the pass in the block; ``kept``:
    what mixing leaves of that output, see :func:`kept_shares`."""

    def compare(name: str, site: AttentionSite, before: Tensor, after: Tensor) -> None:
        outputs = before[:, rows].float()
        left = outputs * kept[name].to(outputs) if name in kept else outputs
        change = (after[:, rows].float() - left).norm(dim=-1)
        found[name] = (change / outputs.norm(dim=-1).clamp(min=1e-20)).mean(dim=(0, 1)).tolist()

    with ExitStack() as stack:
        for name, site in sites.items():
            stack.enter_context(around_memory(site, partial(compare, name, site)))
        yield


@contextmanager
def around_memory(site: AttentionSite, see: Callable[[Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """Call ``see(before, after)`` with the heads' outputs before and after the memories added their answers.

    Both are ``[batch, tokens, heads, value_dim]``. What it returns goes on in the place of ``after``; ``None`` changes
    nothing.
    """
    kept: list[Tensor] = []

    def first(module: nn.Module, args: tuple[Any, ...]) -> None:
        kept.append(args[0])

    def last(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        heads, *rest = args
        shape = (heads.shape[0], -1, site.heads, site.value_dim)
        changed = see(kept.pop().reshape(shape), heads.reshape(shape))
        return None if changed is None else (changed.reshape(heads.shape), *rest)

    projection = site.output_projection
    handles = (projection.register_forward_pre_hook(first, prepend=True), projection.register_forward_pre_hook(last))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
