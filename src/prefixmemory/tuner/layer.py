"""The memory layer: hangs in one attention module, reads its query, adds to its heads' outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from prefixmemory.attention.prepending import Prefix, prepend_prefix
from prefixmemory.attention.sites import AttentionSite, placement
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.memories.config import PrefixMemoryConfig
from prefixmemory.memories.mixing import Mixing
from prefixmemory.memories.registry import MemorySite, ask, is_inside, lacks_mean, queries_of, whole
from prefixmemory.tuner.activation import ModelPass, current_pass
from prefixmemory.tuner.active_tokens import ActiveTokens
from prefixmemory.tuner.by_row import add_by_row
from prefixmemory.tuner.calls import Call, RowAdapters, close_call, current_call, open_call, row_adapters
from prefixmemory.tuner.plan import Plan, Step, score_bias
from prefixmemory.tuner.tensor_parallel import HeadShare

BASE_MODEL = "__base__"  # PEFT's word for "no adapter" in ``adapter_names``

WHY_NOT_MERGED = (
    "A prefix memory cannot be merged into the base weights: it adds φ(q)ᵀM to each head, and φ is not linear, so no "
    "change of a weight matrix equals it. Keep the adapter loaded (it costs a fixed time per token), or call "
    "unload() to get the base model back without it. Trainers that sample with vLLM merge before they hand vLLM the "
    "weights: set use_vllm=False (GRPOTrainer, RLOOTrainer) to sample through transformers, with the memory."
)


class PrefixMemoryLayer(nn.Module, BaseTunerLayer):
    """The memories of one attention module, one per adapter.

    The layer is a child of the attention module (``self_attn.prefix_memory``) and wraps nothing: hooks hand it the
    query, let it add to what the output projection reads, and see that this was done. So the base model keeps its
    modules, their names and its state-dict keys. Nothing of a forward pass stays here: see ``calls.py``.
    """

    site: AttentionSite
    live_site: AttentionSite
    adapter_layer_names = ("prefix_memory_bank", "prefix_memory_mixing")
    other_param_names = ("fixed", "_scale", "configs", "sites")

    def __init__(self, site: AttentionSite, share: HeadShare | None = None) -> None:
        super().__init__()
        self.share = share
        self.prefix_memory_bank = nn.ModuleDict()
        self.prefix_memory_mixing = nn.ModuleDict()
        self._scale: dict[str, float] = {}
        self.configs: dict[str, PrefixMemoryConfig] = {}
        self.sites: dict[str, MemorySite] = {}
        self.fixed: dict[str, list[str]] = {}  # parameters that do not learn, by adapter
        self._plan: Plan | None = None  # for the active adapters; ``None``: there is nothing to do
        self.put_aside: dict[str, Tensor] = {}  # while a model is dispatched, see ``offloading.py``
        self.listener: Any = None  # knows where memories speak, see ``activation.py``
        self.in_encoder = False  # of a model that has a decoder, whose tokens count
        self.first_batch: Any = None  # waits for it to take the means of features, see ``calibration.py``
        self._active_adapter: list[str] = []
        # past nn.Module.__setattr__: the attention module is our parent, not our child
        self.__dict__["site"] = site
        self.__dict__["live_site"] = site if share is None else share.of_site(site)  # what a forward pass shows
        self._handles = site.hook(self._enter, self._show_query, self._add_outputs, self._leave)
        site.attach(self)

    def detach(self) -> None:
        """Remove the hooks and leave the attention module as it was found."""
        for handle in self._handles:
            handle.remove()
        if self.first_batch is not None:
            self.first_batch.leave()
        if self.listener is not None:
            self.listener.leave(self)
        self.site.detach()

    def active_names(self) -> list[str]:
        """Names of the active adapters."""
        return cast(list[str], self.active_adapters)

    @property
    def scale(self) -> Mapping[str, float]:
        """The scale of each adapter, to be read; :meth:`set_scale` sets it."""
        return MappingProxyType(self._scale)

    def memory(self, adapter_name: str) -> nn.Module:
        """The memory of one adapter."""
        return self.prefix_memory_bank[adapter_name]

    def answering(self) -> list[str]:
        """The active adapters of this layer whose scale is not 0."""
        return [name for name in self.active_names() if self.scale.get(name, 0) != 0]

    # What is to be done

    def _replan(self) -> None:
        names = [] if self.disable_adapters else self.active_names()
        self._plan = Plan([self._step(name) for name in names if name in self.prefix_memory_bank]) or None

    def plan(self, rows: RowAdapters | None) -> Plan | None:
        """What is to be done; with ``rows``, each row has its own adapter. ``None``: nothing."""
        if rows is None:
            return self._plan
        if self.disable_adapters:
            return None
        plan = rows.plans.get(self)
        if plan is None:
            names = [name for name in rows.distinct if name in self.prefix_memory_bank]
            plan = rows.plans[self] = Plan([self._step(name) for name in names])
        return plan or None

    def _step(self, name: str) -> Step:
        config, memory = self.configs[name], self.memory(name)
        answers: Callable[..., Tensor]
        if self.share is not None:
            answers = partial(self.share.read, memory)
        elif config.kind.says("is_builtin"):
            answers = memory
        else:
            answers = partial(ask, config.memory, memory, self.sites[name])
        return Step(
            name=name,
            memory=memory,
            ask=answers,
            queries=queries_of(memory, config.query),
            scale=self.scale[name],
            limit=cast(float | None, config.output_limit),
            mixing=cast(Mixing, self.prefix_memory_mixing[name]) if name in self.prefix_memory_mixing else None,
            invocation=None if config.active_from == "start" else tuple(config.invocation_tokens or ()),
            strict=config.strict_invocation,
        )

    # What happens in a forward pass

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module is not self.site.module:
            raise PrefixMemoryError(
                "nn.DataParallel runs copies of the model in threads, which share one memory. Start one "
                "process per GPU with torchrun or accelerate launch, or use one GPU: CUDA_VISIBLE_DEVICES=0."
            )
        rows = row_adapters()
        plan = self.plan(rows)
        if plan is not None and not self.site.intact():
            raise PrefixMemoryError(
                f"A projection of {type(self.site.module).__name__} was wrapped or replaced after its memory was "
                "made, so the memory would read and write beside it. Make the memory last: inject LoRA first, and "
                "keep modules_to_save outside of attention."
            )
        if plan is not None and plan.waiting and current_pass() is None:
            raise PrefixMemoryError(
                f"{type(self.site.module).__name__} was called outside of a forward pass of its model, so that its "
                "memory does not know where it speaks. Call the model, or use active_from='start'."
            )
        open_call(self, plan, rows)

    def _show_query(self, module: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Any, ...]) -> None:
        call = current_call(self)
        # the first alone: some project further vectors later on (DeBERTa v2: relative positions)
        if call is not None and call.plan is not None and call.projected is None:
            call.projected = (output, args[0])

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
        return (*prepended, None if seen_by is None else seen_by.mask)

    def _pass(self, plan: Plan) -> ModelPass | None:
        """The forward pass that says on which tokens memories speak; ``None``: they speak on all."""
        model_pass = current_pass()
        if model_pass is None or self.in_encoder or not (plan.waiting or model_pass.given):
            return None
        return model_pass

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
            mask |= groups.has(step.name)[:, None] & (True if active is None else active.mask)
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
        heads, *rest = args
        model_pass, active = self._pass(call.plan), call.plan.everywhere
        if model_pass is not None:
            active = [model_pass.active(step.invocation) for step in call.plan.outside]
            if all([tokens is not None and tokens.none for tokens in active]):
                return None
        queries = {kind: self._query(call, kind, heads) for kind in call.plan.queries}
        rows = queries[call.plan.queries[0]].shape[:-2]
        outputs = heads.reshape(*rows, self.live_site.heads, self.live_site.value_dim)
        for tokens in active:
            if tokens is not None:
                tokens.check(rows, self.site.module)
        if call.rows is None:
            new = outputs
            for step, tokens in zip(call.plan.outside, active, strict=True):
                new = step.add_to(new, outputs, queries, tokens)
        else:
            new = add_by_row(call.plan, call.rows, outputs, queries, model_pass)
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

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        """As in PyTorch; but what a memory learned with a mean is refused without it, also by ``strict=False``."""
        for name, memory in self.prefix_memory_bank.items():
            place = f"{prefix}prefix_memory_bank.{name}."
            given = [tensor for key, tensor in state_dict.items() if key.startswith(place)]
            if not given or f"{place}mean" in state_dict or not lacks_mean(memory):
                continue
            if all([bool(whole(tensor).any()) for tensor in given]):  # it has learned: one of them started at zero
                raise PrefixMemoryError(
                    f"The tensors of {place[:-1]} come without its mean, which is a parameter that does not require "
                    "a gradient. Save all parameters of the adapter, as save_pretrained does."
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    # PEFT's lifecycle

    def update_layer(self, adapter_name: str, memory: nn.Module, config: PrefixMemoryConfig, site: MemorySite) -> None:
        """Add a memory, which was made for ``site``, under ``adapter_name``."""
        if is_deepspeed_zero3_enabled():
            _keep_as_buffers(memory)
        self.fixed[adapter_name] = [name for name, p in memory.named_parameters() if not p.requires_grad]
        self.prefix_memory_bank[adapter_name] = memory
        if config.mixing != "none":
            assert isinstance(config.mix, float)
            self.prefix_memory_mixing[adapter_name] = Mixing(config.mixing, self.site.heads, config.mix)
        self._scale[adapter_name] = config.scale
        self.configs[adapter_name], self.sites[adapter_name] = config, site
        BaseTunerLayer._move_adapter_to_device_of_base_layer(self, adapter_name)
        self.set_adapter(self.active_names())

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Give one adapter another scale."""
        self._scale[adapter_name] = scale
        self._replan()

    @property
    def scaling(self) -> dict[str, float]:
        """The scales by adapter, as PEFT's ``rescale_adapter_scale`` reads and sets them."""
        return dict(self.scale)

    @scaling.setter
    def scaling(self, scales: dict[str, float]) -> None:
        for name, scale in scales.items():
            if scale < 0 and is_inside(self.memory(name)):
                raise PrefixMemoryError(f"scale={scale} is out of range: inside the softmax, give 0 or more.")
            self.set_scale(name, float(scale))

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT, whose own takes as long for each adapter that is loaded as for the one that becomes active."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for bank in (self.prefix_memory_bank, self.prefix_memory_mixing):
            for name, memory in bank.items():
                learns = name in names and not inference_mode
                for parameter in _parameters(memory):
                    if parameter.requires_grad != learns:
                        parameter.requires_grad_(learns)
        self._freeze_non_trainable_peft_weights(names)
        self._active_adapter = names
        self._replan()

    def enable_adapters(self, enabled: bool) -> None:
        BaseTunerLayer.enable_adapters(self, enabled)
        self._replan()

    def delete_adapter(self, adapter_name: str) -> None:
        BaseTunerLayer.delete_adapter(self, adapter_name)
        self._replan()

    def _freeze_non_trainable_peft_weights(self, adapter_names: Any = None) -> None:
        """PEFT calls this wherever it has let all parameters of adapters learn."""
        for adapter_name in self.fixed if adapter_names is None else adapter_names:
            for name in self.fixed.get(adapter_name, ()):
                self.memory(adapter_name).get_parameter(name).requires_grad_(False)

    def get_base_layer(self) -> nn.Module:
        """The attention module that the layer hangs in."""
        return self.site.module

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        return placement(self.site)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise PrefixMemoryError(WHY_NOT_MERGED)

    def unmerge(self) -> None:
        raise PrefixMemoryError(WHY_NOT_MERGED)

    def extra_repr(self) -> str:
        site = self.site
        return f"heads={site.heads}, kv_heads={site.kv_heads}, head_dim={site.head_dim}, value_dim={site.value_dim}"


def _keep_as_buffers(memory: nn.Module) -> None:
    """Make buffers of the parameters that do not learn: the Trainer's files under ZeRO-3 hold no frozen parameters."""
    for module in memory.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.data)


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


def _parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """As ``module.parameters()``, which takes four times as long, for every adapter at every switch."""
    for parameter in module._parameters.values():
        if parameter is not None:
            yield parameter
    for child in module._modules.values():
        if child is not None:
            yield from _parameters(child)
