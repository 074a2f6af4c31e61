"""The spectrum: in how many directions an adapter changes what attention answers.

The bias of a layer is the output of its attention module with the adapter minus that without it, for the same input
to the module: what the adapter does there, and not what earlier layers did to the input. So it can be measured for
every method that changes attention: ours, LoRA, PEFT's prefix tuning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn
from transformers import Cache

from prefixmemory._shapes import Float
from prefixmemory.analysis.inputs import check_ids, run, text_sites
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.models.modes import evaluating

DEFINITION = (
    "eigenvalues of the covariance (centred, over tokens) of the bias, which is an attention module's output with the "
    "adapter minus that without it for the same input; effective rank = exp(-Σ p log p) of the eigenvalues divided by "
    "their sum (Roy and Vetterli, 2007)"
)


@dataclass(frozen=True)
class Spectrum:
    """What :func:`spectrum` measured.

    Attributes:
        definition: of the figures, in words.
        layers: names of the attention modules.
        tokens: how many the covariance was taken over: no rank can exceed ``tokens - 1``.
        width: size of the bias, that of the hidden state.
        eigenvalues: ``[layer][n]``, falling; at most as many as tokens or width.
        effective_rank: one per layer; 0 where the bias does not vary.
        constant: one per layer: the part of the bias's mean square that is its mean, which covariance does not see.
        relative_norm: one per layer: root mean square of the bias, divided by that of the output without the adapter.
    """

    definition: str
    layers: list[str]
    tokens: int
    width: int
    eigenvalues: list[list[float]]
    effective_rank: list[float]
    constant: list[float]
    relative_norm: list[float]


def effective_rank(eigenvalues: Float[Tensor, " n"]) -> float:
    """exp of the entropy of ``eigenvalues`` divided by their sum; 0 if all are 0."""
    total = eigenvalues.sum()
    if total <= 0:
        return 0.0
    p = eigenvalues[eigenvalues > 0] / total
    return float(torch.exp(-(p * p.log()).sum()))


def spectrum(model: nn.Module, ids: Tensor) -> Spectrum:
    """Measure the spectrum of the active adapter's bias in every attention module, over the tokens of ``ids``.

    Args:
        model: a base model with an adapter of any PEFT method.
        ids: tokens of a text, ``[rows, tokens]``; more of them than ``width`` if ranks shall not be cut off.

    Raises:
        PrefixMemoryError: there is no adapter, it changes no attention output, or the text has fewer than two tokens.
    """
    if ids.numel() == 1:
        raise PrefixMemoryError("A spectrum needs two tokens at least, and the text has one. Give a longer text.")
    layers, ranks, constants, norms, values = [], [], [], [], []
    tokens = width = 0
    for name, (bias, base) in biases(model, ids).items():
        x = bias.flatten(0, -2).double()
        tokens, width = x.shape
        mean = x.mean(dim=0)
        eigenvalues = torch.linalg.svdvals(x - mean) ** 2 / (tokens - 1)
        eigenvalues = eigenvalues.masked_fill(eigenvalues < 1e-14 * x.square().sum(dim=1).mean(), 0)  # rounding
        square = x.square().mean()
        layers.append(name)
        values.append(eigenvalues.tolist())
        ranks.append(effective_rank(eigenvalues))
        constants.append(float(mean.square().mean() / square) if square > 0 else 0.0)
        norms.append(float(square.sqrt() / base.double().square().mean().sqrt()))
    if not any(norms):
        method = model.active_peft_config.peft_type.value if isinstance(model, PeftModel) else ""
        raise PrefixMemoryError(
            f"The adapter (method {method}) changes the output of no attention module on this text, so it has no "
            "spectrum: it is untrained, its scale is 0, or it works elsewhere in the model."
        )
    return Spectrum(DEFINITION, layers, tokens, width, values, ranks, constants, norms)


@torch.no_grad()
def biases(model: nn.Module, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The bias and the output without the adapter, each ``[rows, tokens, width]`` in float32, by attention module."""
    check_ids(model, ids)
    if not isinstance(model, PeftModel):
        raise PrefixMemoryError(f"{type(model).__name__} has no adapter to look at. Load one with load_adapter.")
    config = model.active_peft_config
    prefix = int(config.num_virtual_tokens) if config.peft_type == PeftType.PREFIX_TUNING else 0
    sites = text_sites(model)
    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen[name] = args, kwargs, _first(output).float()

        return hook

    handles = [site.module.register_forward_hook(keep(name), with_kwargs=True) for name, site in sites.items()]
    try:
        run(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    with model.disable_adapter(), evaluating(model):
        for name, (args, kwargs, output) in seen.items():
            args = tuple(_without_cache(arg) for arg in args)
            kwargs = {key: _without_cache(value) for key, value in kwargs.items()}
            mask = kwargs.get("attention_mask")
            if prefix and mask is not None:
                if not isinstance(mask, Tensor) or mask.ndim != 4:
                    raise PrefixMemoryError(
                        "PEFT's prefix tuning can be looked at with attn_implementation='sdpa' or 'eager' only, whose "
                        "masks can be cut. Load the base model with one of them."
                    )
                kwargs["attention_mask"] = mask[..., prefix:]
            base = _first(sites[name].module(*args, **kwargs)).float()
            found[name] = (output - base, base)
    return found


def _first(output: Any) -> Tensor:
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


def _without_cache(value: Any) -> Any:
    """A cache holds PEFT's prefix, and the keys of the pass that was seen."""
    return None if isinstance(value, Cache) else value
