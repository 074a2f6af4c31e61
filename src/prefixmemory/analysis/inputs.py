"""What the instruments share: the attention of a model, a text of a wanted length, and a pass over it."""

from __future__ import annotations

import inspect
from itertools import cycle
from typing import Any, cast

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from prefixmemory._shapes import Int
from prefixmemory.attention.discovery import find_sites, left_out
from prefixmemory.attention.sites import AttentionSite
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.memories.prefix import PrefixVectors
from prefixmemory.memories.registry import is_inside
from prefixmemory.models.modes import evaluating
from prefixmemory.rows.data import northline
from prefixmemory.rows.encoding import encode_prompt
from prefixmemory.tuner.activation import activation
from prefixmemory.tuner.in_attention import InAttention
from prefixmemory.tuner.layers import attention_layers


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside of PEFT's, or ``model`` itself."""
    return cast(nn.Module, model.get_base_model()) if isinstance(model, PeftModel) else model


def text_sites(model: nn.Module) -> dict[str, AttentionSite]:
    """The self-attention of a model's text part by its name in the base model, in order."""
    base = base_of(model)
    sites = find_sites(base)
    others = left_out(base, sites)
    return {name: site for name, site in sites.items() if name not in others}


def prefix_lengths(model: nn.Module) -> dict[str, int]:
    """How many keys of its own the active adapter prepends to the input's, by attention module.

    That is a prefix inside the softmax: ours, or PEFT's prefix tuning. 0: none.
    """
    sites = text_sites(model)
    if isinstance(model, PeftModel) and model.active_peft_config.peft_type == PeftType.PREFIX_TUNING:
        return dict.fromkeys(sites, int(model.active_peft_config.num_virtual_tokens))
    layers = {id(layer.site.module): layer for layer in attention_layers(model)}
    return {name: _inside(layers[id(site.module)]) if id(site.module) in layers else 0 for name, site in sites.items()}


def _inside(layer: InAttention) -> int:
    memories = [layer.memory(name) for name in layer.answering()]
    return sum(cast(PrefixVectors, memory).length for memory in memories if is_inside(memory))


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str | None, length: int | None) -> Int[Tensor, "1 n"]:
    """The first ``length`` tokens of ``text``, or all of them.

    Args:
        tokenizer: of the base model.
        text: any text; ``None``: the messages of the Northline data set, over and over. Then ``length`` is needed.
        length: in tokens.

    Raises:
        PrefixMemoryError: the text is empty, or shorter than ``length``.
    """
    if text is None:
        assert length is not None
        text, sentences = "", cycle(row["text"] for row in northline("test"))
        while len(text) < 12 * length:  # no tokenizer of words or pieces of words makes longer tokens on average
            text += next(sentences) + "\n"
    if not text.strip():
        raise PrefixMemoryError("The text is empty, so there is nothing to look at. Give a file with some sentences.")
    ids = encode_prompt(text, tokenizer)
    if length is not None and len(ids) < length:
        raise PrefixMemoryError(
            f"The text has {len(ids):,} tokens where {length:,} are asked for. Give a longer text, or a smaller number."
        )
    return torch.tensor([ids[:length]])


def check_ids(model: nn.Module, ids: Tensor) -> None:
    """Refuse an input of no token, or one that is longer than the model reads."""
    if ids.numel() == 0:
        raise PrefixMemoryError("The text is empty, so there is nothing to look at. Give some sentences.")
    limit = longest_input(model)
    if ids.shape[1] > limit:
        raise PrefixMemoryError(
            f"The input has {ids.shape[1]:,} tokens where the model reads at most {limit:,}. Give a smaller length."
        )


def longest_input(model: nn.Module) -> int:
    """How many tokens a model reads at most; PEFT's prefix takes positions of them."""
    limit = getattr(getattr(base_of(model), "config", None), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return 10**9
    taken = getattr(model.active_peft_config, "num_virtual_tokens", 0) if isinstance(model, PeftModel) else 0
    return limit - int(taken or 0)


@torch.no_grad()
def run(model: nn.Module, ids: Tensor) -> None:
    """One pass over ``ids``, in evaluation mode, without a cache of its own; nothing is returned.

    Memories speak on all tokens, whatever they wait for: what they say is looked at.
    """
    known = inspect.signature(base_of(model).forward).parameters
    options: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}  # logits of thousands of tokens take gigabytes
    options = {name: value for name, value in options.items() if name in known}
    with evaluating(model), activation([0]):
        model(input_ids=ids.to(next(model.parameters()).device), **options)
