"""The memories of one projection of a feed-forward block, or of a block of experts: they read what it reads, and add to
what it returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prefixmemory.attention.feed_forward import FeedForwardSite
from prefixmemory.tuner.layer import PrefixMemoryLayer


class InFeedForward(PrefixMemoryLayer):
    """The memories of one feed-forward projection: to them, one head whose query is what the projection reads."""

    site: FeedForwardSite

    def _hook(self) -> tuple[RemovableHandle, ...]:
        return (self.site.module.register_forward_hook(self._add_output, with_kwargs=True),)

    @property
    def projection(self) -> nn.Module:
        """The module itself."""
        return self.site.module

    def _add_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        plan, adapters = self._begin(module)
        speaking = None if plan is None else self._speaking(plan)
        if plan is None or speaking is None:
            return None
        own, *rest = output if isinstance(output, tuple) else (output,)
        read = args[0] if args else next(iter(kwargs.values()))
        query, outputs = read.unsqueeze(-2), own.reshape(*read.shape[:-1], 1, own.shape[-1])
        if adapters is not None and read.ndim == 2:  # all tokens in one row: a group of them is an adapter's
            query, outputs = (x.unflatten(0, (len(adapters.names), -1)) for x in (query, outputs))
        new: Tensor = self._joined(plan, adapters, outputs, {"content": query}, speaking).view(own.shape)
        return (new, *rest) if isinstance(output, tuple) else new

    def extra_repr(self) -> str:
        return f"reads={self.site.reads}, returns={self.site.returns}"
