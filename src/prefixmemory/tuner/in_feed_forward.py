"""The memories of one projection of a feed-forward block, or of a block of experts: they read what it reads, and add to
what it returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prefixmemory.attention.feed_forward import FeedForwardSite
from prefixmemory.errors import PrefixMemoryError
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

    @property
    def is_lost(self) -> bool:
        """Whether the projection was replaced, and took the layer out of the model."""
        return not self.site.intact()

    def _add_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        plan, adapters = self._begin(module)
        speaking = None if plan is None else self._speaking(plan)
        if plan is None or speaking is None:
            return None
        own, *rest = output if isinstance(output, tuple) else (output,)
        named = (kwargs[name] for name in ("hidden_states", "input", "x") if name in kwargs)
        read = args[0] if args else next(named, None)
        if read is None:
            raise PrefixMemoryError(
                f"{type(module).__name__} is given {', '.join(kwargs) or 'nothing'} by keyword, so that its memory "
                "does not know what to read. Leave it out with exclude_modules."
            )
        query, outputs = read.unsqueeze(-2), own.reshape(*read.shape[:-1], 1, own.shape[-1])
        if adapters is not None and read.ndim == 2:  # all tokens in one row: a group of them is an adapter's
            if len(read) % len(adapters.names):
                raise PrefixMemoryError(
                    f"{type(module).__name__} reads {len(read)} tokens of {len(adapters.names)} rows, so that its "
                    "memory does not know whose they are. Leave it out with exclude_modules."
                )
            query, outputs = (x.unflatten(0, (len(adapters.names), -1)) for x in (query, outputs))
        new: Tensor = self._joined(plan, adapters, outputs, {"content": query}, speaking).view(own.shape)
        return (new, *rest) if isinstance(output, tuple) else new

    def extra_repr(self) -> str:
        return f"reads={self.site.reads}, returns={self.site.returns}"
