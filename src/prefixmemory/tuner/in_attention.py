"""The memories of one attention module: they read its query, and add to its heads' outputs."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prefixmemory.attention.prepending import Prefix, prepend_prefix
from prefixmemory.attention.sites import AttentionSite
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.tuner.activation import ModelPass
from prefixmemory.tuner.active_tokens import ActiveTokens
from prefixmemory.tuner.calls import Call, RowAdapters, close_call, current_call, open_call
from prefixmemory.tuner.layer import PrefixMemoryLayer
from prefixmemory.tuner.plan import Step, score_bias
from prefixmemory.tuner.tensor_parallel import HeadShare


class InAttention(PrefixMemoryLayer):
    """The memories of one attention module.

    Hooks hand it the query, let it add to what the output projection reads, and see that this was done.
    """

    site: AttentionSite
    live_site: AttentionSite

    def __init__(self, site: AttentionSite, share: HeadShare | None = None) -> None:
        super().__init__(site, share)
        self.__dict__["live_site"] = site if share is None else share.of_site(site)  # what a forward pass shows

    def _hook(self) -> tuple[RemovableHandle, ...]:
        return self.site.hook(self._enter, self._show_query, self._add_outputs, self._leave)

    @property
    def projection(self) -> nn.Module:
        """Its output projection."""
        return self.site.output_projection

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        plan, rows = self._begin(module)
        if plan is not None and not self.site.intact():
            raise PrefixMemoryError(
                f"A projection of {type(self.site.module).__name__} was wrapped or replaced after its memory was "
                "made, so the memory would read and write beside it. Make the memory last: inject LoRA first, and "
                "keep modules_to_save outside of attention."
            )
        open_call(self, plan, rows)

    def _show_query(self, module: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Any, ...]) -> None:
        call = current_call(self)
        # the first alone: some project further vectors later on (DeBERTa v2: relative positions)
        if call is None or call.plan is None or call.projected is not None:
            return
        query = output[0] if isinstance(output, tuple) else output
        if "content" in call.plan.queries and (torch.compiler.is_compiling() or self.site.may_write_into_queries):
            query = query.clone()  # which a compiler leaves out where nothing writes
        call.projected = (query, args[0])

    def on_attention(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, keywords: dict[str, Any], implementation: str
    ) -> tuple[Tensor, Tensor, Any, dict[str, Any], Tensor | None]:
        """Called before the attention function: keeps the rotated query; returns keys, values, mask and keywords, with
        the prefix of the adapters inside the softmax prepended, and which queries see it, bool ``[batch, queries]``;
        ``None``: all of them."""
        call = current_call(self)
        if call is None or call.plan is None:
            return key, value, mask, keywords, None
        call.was_inside = True
        call.queries["rotary"] = query.transpose(1, 2)  # [B, H, T, D] -> [B, T, H, D]
        if not call.plan.inside:
            return key, value, mask, keywords, None
        model_pass = self._pass(call.plan)
        seen_by = None if model_pass is None else self._seen_by(model_pass, call.plan.inside, call.rows, query)
        if seen_by is not None and seen_by.none:
            return key, value, mask, keywords, None
        prefix = self._prefix(call.plan.inside, call.rows, key)
        prepended = prepend_prefix(prefix, self.site.core, query, key, value, mask, keywords, implementation)
        return (*prepended, None if seen_by is None else seen_by.on(query.device))

    def _seen_by(
        self, model_pass: ModelPass, steps: list[Step], rows: RowAdapters | None, query: Tensor
    ) -> ActiveTokens | None:
        """The queries that see the prefixes inside the softmax; ``None``: all."""
        found = [model_pass.active(step.invocation) for step in steps]
        if rows is None:
            if any(active is not found[0] for active in found):
                raise PrefixMemoryError(
                    "Several prefixes inside the softmax that are seen from different tokens on cannot be active "
                    "together. Activate one of them, or place them outside."
                )
            return found[0]
        groups = rows.groups(query.shape[0], query.device)
        mask = torch.zeros(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
        for step, active in zip(steps, found, strict=True):
            mask |= groups.has(step.name)[:, None] & (True if active is None else active.on(query.device))
        return ActiveTokens.of(mask)

    def _prefix(self, steps: list[Step], rows: RowAdapters | None, key: Tensor) -> Prefix:
        """The prefixes of the adapters inside the softmax, one behind the other."""
        keys, values = zip(*(_vectors(step.memory) for step in steps), strict=True)
        lengths = [k.shape[1] for k in keys]
        bias = score_bias(steps, lengths, keys[0].float())
        scaled = bias is not None
        if rows is not None:
            groups = rows.groups(key.shape[0], key.device)
            here = [groups.has(step.name)[:, None].expand(-1, n) for step, n in zip(steps, lengths, strict=True)]
            bias = keys[0].new_zeros(1, sum(lengths), dtype=torch.float32) if bias is None else bias
            bias = bias.to(key.device).masked_fill(~torch.cat(here, dim=1), -torch.inf)
        return Prefix(torch.cat(keys, dim=1)[None], torch.cat(values, dim=1)[None], bias, scaled)

    def _add_outputs(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        call = current_call(self)
        if call is None:
            if self._plan is None:
                return None
            raise PrefixMemoryError(
                f"The output projection of {type(self.site.module).__name__} was called outside of its attention, so "
                "its memory was not shown a query. Exclude it with exclude_modules."
            )
        call.was_read = True
        if call.plan is None:
            return None
        if call.plan.inside and not call.was_inside:
            raise PrefixMemoryError(
                f"{type(self.site.module).__name__} did not call its attention function through transformers' "
                "interface, so its prefix inside the softmax was passed by. Exclude it with exclude_modules."
            )
        if not call.plan.outside:
            return None
        speaking = self._speaking(call.plan)
        if speaking is None:
            return None
        heads, *rest = args
        queries = {kind: self._query(call, kind, heads) for kind in call.plan.queries}
        rows = queries[call.plan.queries[0]].shape[:-2]
        outputs = heads.reshape(*rows, self.live_site.heads, self.live_site.value_dim)
        new = self._joined(call.plan, call.rows, outputs, queries, speaking)
        return (new.reshape(heads.shape), *rest)

    def _query(self, call: Call, kind: str, heads: Tensor) -> Tensor:
        """The queries of the tokens whose heads' outputs are ``heads``; what is left is for the next such call."""
        query = call.queries.pop(kind, None)
        if query is None and kind == "content" and call.projected is not None and call.projected[0] is not None:
            query = self.live_site.query_from(*call.projected)
            call.projected = (None, call.projected[1])  # taken
        if query is None:
            raise PrefixMemoryError(
                f"{type(self.site.module).__name__} reached its output projection without showing a {kind} query. "
                "Its forward is not one that prefixmemory knows; exclude it with exclude_modules."
            )
        query, left = self.live_site.take(query, heads)
        if left is not None:
            call.queries[kind] = left
        return query

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = close_call(self)
        if call is None or call.plan is None or output is None:  # nothing to do, or the call was broken off
            return
        if not call.was_read or "content" in call.queries:
            raise PrefixMemoryError(
                f"{type(module).__name__} finished without its output projection reading every head's output, so its "
                "memory was passed by. Its forward is not one that prefixmemory knows; exclude it with exclude_modules."
            )

    def extra_repr(self) -> str:
        site = self.site
        return f"heads={site.heads}, kv_heads={site.kv_heads}, head_dim={site.head_dim}, value_dim={site.value_dim}"


def _vectors(memory: Any) -> tuple[Tensor, Tensor]:
    """The prefix of a memory inside the softmax. accelerate, if it has offloaded it, thinks of calls alone."""
    hook = getattr(memory, "_hf_hook", None)
    if hook is None:
        return cast(tuple[Tensor, Tensor], memory.vectors())
    hook.pre_forward(memory)
    try:
        return cast(tuple[Tensor, Tensor], memory.vectors())
    finally:
        hook.post_forward(memory, None)
