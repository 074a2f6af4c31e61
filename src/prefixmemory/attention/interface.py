"""transformers' attention interface: seeing and changing what attention functions receive.

For ``query="rotary"`` and ``placement="inside"`` one function of transformers is wrapped, once a process.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import AttentionInterface

from prefixmemory.attention import families
from prefixmemory.attention.sites import CHILD, AttentionSite
from prefixmemory.errors import PrefixMemoryError

#: Shown every call of an attention function behind the tap: what it really received, and its output. Empty unless
#: ``analysis.observe`` is at work.
OBSERVERS: list[Callable[..., None]] = []


def check_interface(
    name: str, site: AttentionSite, what: str, advice: str = "Use query='content' and placement='outside'."
) -> None:
    """Refuse ``what``, such as ``query='rotary'``, where a model's attention function cannot be reached."""
    forward = type(site.core).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    if "ALL_ATTENTION_FUNCTIONS" not in forward.__code__.co_names:
        raise PrefixMemoryError(
            f"{what} cannot be had in {name} ({type(site.core).__name__}): it does not use transformers' attention "
            f"interface. {advice}"
        )


def check_inside(name: str, site: AttentionSite) -> None:
    """Refuse ``placement='inside'`` where a prefix would not reach the attention function as keys and values do."""
    check_interface(name, site, "placement='inside'")
    for classes, reason in families.NO_PREFIX_INSIDE.items():
        if re.match(classes, type(site.core).__name__):
            raise PrefixMemoryError(
                f"placement='inside' cannot be had in {name} ({type(site.core).__name__}): {reason}. "
                "Use placement='outside'."
            )


def _where_seen(seen_by: Tensor, output: Any, own: Any) -> Any:
    """An attention function's output for the queries that see the prefix, else its ``own``, to which nothing was added.

    Queries that may not see the prefix are computed without it, so that theirs are the bits of the base model, whatever
    the attention function.
    """
    heads = torch.where(seen_by[:, :, None, None], output[0], own[0])
    if len(output) == 1 or output[1] is None:
        return (heads, *output[1:])
    weights = functional.pad(own[1], (output[1].shape[-1] - own[1].shape[-1], 0))
    return (heads, torch.where(seen_by[:, None, :, None], output[1], weights), *output[2:])


def install_tap() -> None:
    """Let memory layers see and change what attention functions receive, in every model and backend.

    ``AttentionInterface.get_interface`` hands out the attention function of each call; what it hands out is wrapped
    so that a memory layer hanging in the calling module is shown the query and may prepend its prefix to keys and
    values. Without such a layer the wrapper only passes its arguments on. Installed once, when the first memory with
    ``query="rotary"`` or ``placement="inside"`` is made.
    """
    original = AttentionInterface.get_interface
    if getattr(original, "_shows_query_to_memories", False):
        return

    def get_interface(self: AttentionInterface, attn_implementation: str, default: Callable[..., Any]) -> Any:
        function = original(self, attn_implementation, default)

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
        ) -> Any:
            layer: Any = module._modules.get(CHILD) or module.__dict__.get(CHILD)
            without, seen_by = (key, value, attention_mask, kwargs), None
            if layer is not None:
                key, value, attention_mask, kwargs, seen_by = layer.on_attention(
                    query, key, value, attention_mask, kwargs, attn_implementation
                )
            read = attn_implementation == "paged|eager" and "cache" not in kwargs  # by the layer, before its prefix
            attention = default if read else function
            output = attention(module, query, key, value, attention_mask, *args, **kwargs)
            if seen_by is not None:
                own = function(module, query, *without[:3], *args, **without[3])
                output = _where_seen(seen_by, output, own)
            for observer in OBSERVERS:
                observer(module, query, key, value, attention_mask, kwargs, output, attn_implementation)
            return output

        return attend

    get_interface._shows_query_to_memories = True  # type: ignore[attr-defined]
    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]
