"""The readout: which tokens a head's memory speaks for, and which heads matter."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixmemory._shapes import Float
from prefixmemory.analysis.inputs import base_of, check_ids, text_sites
from prefixmemory.analysis.tradeoff import around_memory
from prefixmemory.attention.sites import AttentionSite
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.memories.registry import matrix_of
from prefixmemory.models.modes import evaluating
from prefixmemory.tuner.activation import activation
from prefixmemory.tuner.in_attention import InAttention
from prefixmemory.tuner.layers import attention_layers

DEFINITION = (
    "right singular vectors of a head's memory, sent through the head's part of the output projection, {norm} and the "
    "unembedding, as if nothing else were in the residual stream; what a zero vector gives is taken away. A singular "
    "vector's sign is arbitrary: the tokens at both ends are given"
)
#: Names of the norm before the unembedding.
FINAL_NORM = re.compile(r"(^|\.)(norm|ln_f|final_layer_?norm|final_norm|norm_f|embedding_norm)$")


@dataclass(frozen=True)
class Direction:
    """One singular direction of one head's memory.

    Attributes:
        layer, head: where.
        singular_value: of the memory, times the adapter's scale.
        energy: its part of the sum of the squared singular values.
        tokens, logits: the nearest tokens and what the direction adds to their logits, falling.
        opposite_tokens, opposite_logits: those at the other end.
    """

    layer: str
    head: int
    singular_value: float
    energy: float
    tokens: list[str]
    logits: list[float]
    opposite_tokens: list[str]
    opposite_logits: list[float]


@dataclass(frozen=True)
class Readout:
    """What :func:`readout` found.

    Attributes:
        definition: in words, with the name of the final norm.
        layers: names of the attention modules with a memory.
        norms: ``[layer][head]``, Frobenius norm of the memory, times the adapter's scale.
        directions: of every head, the leading ones first; none of a head whose memory is zero.
    """

    definition: str
    layers: list[str]
    norms: list[list[float]]
    directions: list[Direction]


@dataclass(frozen=True)
class Ablation:
    """What :func:`ablate` measured.

    Attributes:
        layers: names of the attention modules with a memory.
        loss: with all heads' memories.
        change: ``[layer][head]``, how much the loss rises without this head's memory; ``None`` where not measured.
    """

    layers: list[str]
    loss: float
    change: list[list[float | None]]


@dataclass(frozen=True)
class Heads(Readout):
    """What the heads' memories speak for, and what the loss gains by each."""

    ablation: Ablation


@torch.no_grad()
def readout(model: nn.Module, tokenizer: PreTrainedTokenizerBase, directions: int = 2, tokens: int = 8) -> Readout:
    """The leading singular directions of every head's memory, as tokens.

    For prefix vectors outside the softmax, read through a feature map, the memory is B = Σ φ(k)vᵀ.

    Args:
        model: a base model with a memory.
        tokenizer: of the base model.
        directions: how many of each head.
        tokens: how many at each end.

    Raises:
        PrefixMemoryError: there is no memory in the adapter, or the model has no unembedding.
    """
    base = base_of(model)
    unembedding = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    if unembedding is None:
        raise PrefixMemoryError(f"{type(base).__name__} has no unembedding, so a memory cannot be read out as tokens.")
    name, norm = final_norm(base)
    banks = memories(model)
    found: list[Direction] = []
    norms = []
    with evaluating(model):
        for layer_name, (site, bank) in banks.items():
            _, singular, right = torch.linalg.svd(bank, full_matrices=False)
            count = min(directions, singular.shape[1])
            hidden = project(site, right[:, :count])
            logits = _logits(hidden, norm, unembedding)
            norms.append(bank.flatten(1).norm(dim=1).tolist())
            energy = singular**2 / (singular**2).sum(dim=1, keepdim=True).clamp(min=1e-30)
            for head in range(site.heads):
                for n in range(count):
                    if energy[head, n] < 1e-10:  # the memory ends here: any direction would do
                        break
                    high, low = logits[head, n].topk(tokens), (-logits[head, n]).topk(tokens)
                    found.append(
                        Direction(
                            layer=layer_name,
                            head=head,
                            singular_value=float(singular[head, n]),
                            energy=float(energy[head, n]),
                            tokens=_words(tokenizer, high.indices),
                            logits=high.values.tolist(),
                            opposite_tokens=_words(tokenizer, low.indices),
                            opposite_logits=(-low.values).tolist(),
                        )
                    )
    shown = f"the final norm ({name})" if name else "no final norm (none was found)"
    return Readout(DEFINITION.format(norm=shown), list(banks), norms, found)


def _words(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> list[str]:
    return [str(tokenizer.decode([int(token)])) for token in ids]


def memories(model: nn.Module) -> dict[str, tuple[AttentionSite, Float[Tensor, "h f v"]]]:
    """Site and memory, times scale, of every attention module with an active memory; float32.

    Raises:
        PrefixMemoryError: there is none, or a registered memory does not say what it holds.
    """
    return {name: (layer.site, _bank(layer, adapter)) for name, (layer, adapter) in _holders(model).items()}


def _holders(model: nn.Module) -> dict[str, tuple[InAttention, str]]:
    """The layer, and the name of the one active memory in it, by attention module."""
    layers = {id(layer.site.module): layer for layer in attention_layers(model)}
    found = {}
    for name, site in text_sites(model).items():
        layer = layers.get(id(site.module))
        if layer is None:
            continue
        active = [adapter for adapter in layer.answering() if _is_memory(layer.memory(adapter))]
        if len(active) > 1:
            raise PrefixMemoryError("Several memories are active. Choose one with set_adapter to read it out.")
        if active:
            found[name] = (layer, active[0])
    if not found:
        raise PrefixMemoryError(
            "There is no memory in this adapter to read out (its scale is 0, it is another method, or it holds prefix "
            "vectors that are read by a softmax). Give an adapter with a free memory, or with a feature map."
        )
    return found


def _is_memory(memory: nn.Module) -> bool:
    """Whether features of the query are read against something: not by a softmax."""
    return not getattr(memory, "uses_softmax", False)


def _bank(layer: InAttention, name: str) -> Tensor:
    config = layer.configs[name]
    bank = matrix_of(config.memory, layer.memory(name), layer.sites[name])
    scale = layer.scale[name] * cast(float, config.head_scale)
    return bank.detach().float().repeat_interleave(layer.site.heads // bank.shape[0], dim=0) * scale


def project(site: AttentionSite, directions: Float[Tensor, "h n v"]) -> Float[Tensor, "h n e"]:
    """What a head's output ``directions`` adds to the residual stream: its part of the output projection, no bias."""
    heads, count, size = directions.shape
    weight = next(site.output_projection.parameters(), None)
    like = directions if weight is None or not weight.is_floating_point() else directions.to(weight.dtype)
    flat = like.new_zeros(heads, count, heads, size)
    flat[torch.arange(heads), :, torch.arange(heads)] = like
    flat = flat.flatten(2)
    forward = site.output_projection.forward  # past its hooks: a memory would add its answer
    return cast(Tensor, (forward(flat) - forward(torch.zeros_like(flat[:1, :1]))).float())


def final_norm(base: nn.Module) -> tuple[str, nn.Module | None]:
    """The norm before the unembedding and its name; empty and ``None`` if there is none that is known."""
    inner = tuple(f"{name}." for name, module in base.named_modules() if isinstance(module, nn.ModuleList))
    found = [
        (name, module)
        for name, module in base.named_modules()
        if FINAL_NORM.search(name) and not name.startswith(inner)
    ]
    # beside the layers of the text; a vision tower has norms of its own
    layers = {next((prefix for prefix in inner if name.startswith(prefix)), "") for name in text_sites(base)}
    parents = {prefix.removesuffix(".").rpartition(".")[0] for prefix in layers}
    beside = [(name, module) for name, module in found if name.rpartition(".")[0] in parents]
    return next(iter([*beside, *found]), ("", None))


def _logits(hidden: Tensor, norm: nn.Module | None, unembedding: nn.Module) -> Tensor:
    dtype = next(unembedding.parameters()).dtype

    def read(x: Tensor) -> Tensor:
        x = x.to(dtype)
        return cast(Tensor, unembedding(x if norm is None else norm(x))).float()

    return read(hidden) - read(torch.zeros_like(hidden[:1, :1]))


def ablate(
    model: nn.Module,
    loss: Callable[[], float],
    heads: Iterable[tuple[str, int]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Ablation:
    """Take away what the memory of one head adds, one head at a time, and measure the loss.

    Args:
        model: a base model with a memory outside the softmax.
        loss: computes the loss of ``model`` on given rows, such as :func:`text_loss`.
        heads: ``(layer name, head)`` pairs to measure; ``None``: all, one call of ``loss`` each.
        progress: called with 1 after each head.

    Raises:
        PrefixMemoryError: there is no memory in the adapter, or no such head.
    """
    sites = {name: layer.site for name, (layer, _) in _holders(model).items()}
    wanted = [(name, head) for name, site in sites.items() for head in range(site.heads)] if heads is None else heads
    whole = loss()
    change: dict[str, list[float | None]] = {name: [None] * site.heads for name, site in sites.items()}
    for name, head in wanted:
        if name not in sites or not 0 <= head < sites[name].heads:
            raise PrefixMemoryError(
                f"There is no memory of head {head} in {name!r}. Give heads of: {', '.join(sites)}."
            )

        def without(before: Tensor, after: Tensor, head: int = head) -> Tensor:
            kept = after.clone()
            kept[:, :, head] = before[:, :, head]
            return kept

        with around_memory(sites[name], without):
            change[name][head] = loss() - whole
        if progress is not None:
            progress(1)
    return Ablation(list(sites), whole, list(change.values()))


@torch.no_grad()
def text_loss(model: nn.Module, ids: Tensor) -> float:
    """Mean negative log-likelihood of the tokens of a text, in nats; memories speak on all of them.

    Args:
        model: a causal language model, adapted or not.
        ids: ``[rows, tokens]``, no padding.
    """
    check_ids(model, ids)
    ids = ids.to(next(model.parameters()).device)
    with evaluating(model), activation([0]):
        logits = model(input_ids=ids).logits[:, :-1].float()
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
