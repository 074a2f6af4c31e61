"""What attention functions really receive and answer, behind every prefix that was prepended.

Shares and maps of attention are computed here from queries, keys and masks, for a few queries at a time. So no
backend has to hand out attention weights, and inputs of thousands of tokens fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefixmemory._shapes import Float, Int
from prefixmemory.analysis.inputs import text_sites
from prefixmemory.attention.interface import OBSERVERS, check_interface, install_tap
from prefixmemory.errors import PrefixMemoryError


@dataclass(frozen=True)
class Call:
    """One call of an attention function.

    Attributes:
        name: of the attention module in the base model, such as ``model.layers.3.self_attn``.
        module: the module that called.
        query: ``[batch, heads, queries, head_dim]``, as it was passed.
        key, value: ``[batch, kv_heads, keys, dim]``, as they were passed; a prefix stands first.
        mask: as it was passed.
        scaling: factor on q·k.
        output: the answer, ``[batch, queries, heads, value_dim]``.
        implementation: name of the backend, such as ``sdpa``.
        options: the other arguments by name.
    """

    name: str
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    scaling: float
    output: Tensor
    implementation: str
    options: Mapping[str, Any]

    def scores(self, rows: Int[Tensor, " s"]) -> Float[Tensor, "b h s j"]:
        """What the softmax receives for the queries ``rows``, float32; ``-inf`` where a key is not allowed.

        Raises:
            PrefixMemoryError: the backend or the model attends in a way that cannot be computed from outside.
        """
        if self.options.get("s_aux") is not None:
            raise PrefixMemoryError(
                f"{type(self.module).__name__} gives a part of its attention to a sink, which this instrument does "
                "not know. Use another model."
            )
        if self.implementation not in ("eager", "sdpa") or not (self.mask is None or isinstance(self.mask, Tensor)):
            raise PrefixMemoryError(
                f"This instrument cannot read the masks of attn_implementation={self.implementation!r}. Load the base "
                "model with attn_implementation='sdpa' or 'eager'."
            )
        q, k = self.query[:, :, rows].float(), self.key.float()
        grouped = q.unflatten(1, (k.shape[1], -1))
        scores = torch.einsum("bgrsd,bgjd->bgrsj", grouped, k).flatten(1, 2) * self.scaling
        cap = self.options.get("softcap")
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        bias = self.options.get("position_bias")
        if bias is not None:
            scores = scores + bias[:, :, rows if bias.shape[2] > 1 else slice(None)].float()
        if self.mask is None:
            return self._causal(scores, rows)
        mask = self.mask[:, :, rows] if self.mask.shape[2] > 1 else self.mask
        if mask.dtype == torch.bool:
            return scores.masked_fill(~mask, -torch.inf)
        return (scores + mask.float()).masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf)

    def _causal(self, scores: Tensor, rows: Tensor) -> Tensor:
        """What no mask means: everything is allowed in eager attention, torch counts from the first key."""
        asked = self.options.get("is_causal")
        causal = getattr(self.module, "is_causal", True) if asked is None else asked
        if self.implementation == "eager" or not causal or self.query.shape[2] == 1:
            return scores
        later = torch.arange(scores.shape[-1], device=scores.device) > rows[:, None].to(scores.device)
        return scores.masked_fill(later, -torch.inf)


@contextmanager
def observe(model: nn.Module, observer: Callable[[Call], None]) -> Iterator[None]:
    """Show ``observer`` every call that the self-attention modules of ``model`` make, until the block ends.

    Args:
        model: a transformers model, with or without adapters.
        observer: called after each attention function. It must not change the tensors, nor keep them longer than it
            needs to: they are those of the running pass.

    Raises:
        PrefixMemoryError: the model does not use transformers' attention interface.
    """
    sites = text_sites(model)
    for name, site in sites.items():
        check_interface(name, site, "A look at attention", "Use another model.")
    install_tap()
    names = {id(site.core): name for name, site in sites.items()}

    def on_call(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        options: Mapping[str, Any],
        output: Any,
        implementation: str,
    ) -> None:
        if id(module) not in names:
            return
        others = {key: option for key, option in options.items() if key != "scaling"}
        scaling = options.get("scaling")
        observer(
            Call(
                name=names[id(module)],
                module=module,
                query=query,
                key=key,
                value=value,
                mask=mask,
                scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
                output=output[0] if isinstance(output, tuple) else output,
                implementation=implementation,
                options=others,
            )
        )

    OBSERVERS.append(on_call)
    try:
        yield
    finally:
        OBSERVERS.remove(on_call)
