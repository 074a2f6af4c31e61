"""The memory layer: the memories of one module, one per adapter, and what is to be done with them in a forward pass.

Where it hangs, what it reads and what it adds to, is the business of its two kinds: ``in_attention.py`` and
``in_feed_forward.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from prefixmemory.attention.feed_forward import FeedForwardSite
from prefixmemory.attention.sites import AttentionSite, placement
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.memories.config import PrefixMemoryConfig
from prefixmemory.memories.mixing import Mixing
from prefixmemory.memories.registry import MemorySite, ask, is_inside, lacks_mean, queries_of, whole
from prefixmemory.tuner.activation import ModelPass, current_pass
from prefixmemory.tuner.active_tokens import ActiveTokens
from prefixmemory.tuner.by_row import add_by_row
from prefixmemory.tuner.calls import RowAdapters, row_adapters, thread
from prefixmemory.tuner.plan import Plan, Step
from prefixmemory.tuner.tensor_parallel import HeadShare

BASE_MODEL = "__base__"  # PEFT's word for "no adapter" in ``adapter_names``

#: The pass that says where memories speak, and where each of them does; ``None``: everywhere.
Speaking = tuple[ModelPass | None, list[ActiveTokens | None]]

WHY_NOT_MERGED = (
    "A prefix memory cannot be merged into the base weights: it adds φ(q)ᵀM to each head, and φ is not linear, so no "
    "change of a weight matrix equals it. Keep the adapter loaded (it costs a fixed time per token), or call "
    "unload() to get the base model back without it. Trainers that sample with vLLM merge before they hand vLLM the "
    "weights: set use_vllm=False (GRPOTrainer, RLOOTrainer) to sample through transformers, with the memory."
)


class PrefixMemoryLayer(nn.Module, BaseTunerLayer):
    """The memories of one module, one per adapter.

    The layer is a child of that module (``self_attn.prefix_memory``) and wraps nothing: hooks hand it what it reads,
    and let it add to what the module says by itself. So the base model keeps its modules, their names and its
    state-dict keys. Nothing of a forward pass stays here: see ``calls.py``.
    """

    site: AttentionSite | FeedForwardSite
    adapter_layer_names = ("prefix_memory_bank", "prefix_memory_mixing")
    other_param_names = ("fixed", "_scale", "configs", "sites")

    def __init__(self, site: AttentionSite | FeedForwardSite, share: HeadShare | None = None) -> None:
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
        self.__dict__["site"] = site  # past nn.Module.__setattr__: the module is our parent, not our child
        self._handles = self._hook()
        site.attach(self)

    def _get_name(self) -> str:
        return "PrefixMemoryLayer"  # in repr(model)

    @property
    def is_lost(self) -> bool:
        """Whether the model has lost the layer; an attention module sees for itself what was replaced in it."""
        return False

    def _hook(self) -> tuple[RemovableHandle, ...]:
        """Set the hooks by which the module's passes reach the layer."""
        raise NotImplementedError

    @property
    def projection(self) -> nn.Module:
        """The module on whose device, and in whose dtype, memories compute."""
        raise NotImplementedError

    def detach(self) -> None:
        """Remove the hooks and leave the module as it was found."""
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
            scale=self.scale[name] * cast(float, config.head_scale),
            limit=cast(float | None, config.output_limit),
            mixing=cast(Mixing, self.prefix_memory_mixing[name]) if name in self.prefix_memory_mixing else None,
            invocation=None if config.active_from == "start" else tuple(config.invocation_tokens or ()),
            strict=config.strict_invocation,
        )

    # What happens in a forward pass

    def _begin(self, module: nn.Module) -> tuple[Plan | None, RowAdapters | None]:
        """What is to be done in a call of ``module`` that begins, and an adapter for each row, if asked for.

        Raises:
            PrefixMemoryError: it is called where a memory cannot be read.
        """
        if module is not self.site.module:
            raise PrefixMemoryError(
                "nn.DataParallel runs copies of the model in threads, which share one memory. Start one "
                "process per GPU with torchrun or accelerate launch, or use one GPU: CUDA_VISIBLE_DEVICES=0."
            )
        rows = row_adapters(self)
        plan = self.plan(rows)
        waits = plan is not None and (plan.waiting or (thread.given is not None and not self.in_encoder))
        if waits and current_pass() is None:
            raise PrefixMemoryError(
                f"{type(self.site.module).__name__} was called outside of a forward pass of its model, so that its "
                "memory does not know where it speaks. Call the model, or use active_from='start'. With "
                "torch.compile and gradient checkpointing together layers are called so: leave out one of them."
            )
        return plan, rows

    def _pass(self, plan: Plan) -> ModelPass | None:
        """The forward pass that says on which tokens memories speak; ``None``: they speak on all."""
        model_pass = current_pass()
        if model_pass is None or self.in_encoder or not (plan.waiting or model_pass.given):
            return None
        return model_pass

    def _speaking(self, plan: Plan) -> Speaking | None:
        """On which tokens the memories outside the softmax speak; ``None``: they are silent on all of this pass."""
        model_pass = self._pass(plan)
        if model_pass is None:
            return None, plan.everywhere
        active = [model_pass.active(step.invocation) for step in plan.outside]
        if all([tokens is not None and tokens.none for tokens in active]):
            return None
        return model_pass, active

    def _joined(
        self, plan: Plan, rows: RowAdapters | None, outputs: Tensor, queries: dict[str, Tensor], speaking: Speaking
    ) -> Tensor:
        """What the memories outside the softmax make of ``outputs`` ``[batch, tokens, heads, value_dim]``.

        Raises:
            PrefixMemoryError: these are not the tokens of the forward pass.
        """
        model_pass, active = speaking
        for tokens in active:
            if tokens is not None:
                tokens.check(outputs.shape[:-2], self.site.module)
        if rows is not None:
            return add_by_row(plan, rows, outputs, queries, model_pass)
        new = outputs
        for step, tokens in zip(plan.outside, active, strict=True):
            new = step.add_to(new, outputs, queries, tokens)
        return new

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
            self.prefix_memory_mixing[adapter_name] = Mixing(config.mixing, site.heads, config.mix)
        self.train(self.site.module.training)  # a new module learns; in use, dropout would draw
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
        """The module that the layer hangs in."""
        return self.site.module

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        return placement(self.projection)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise PrefixMemoryError(WHY_NOT_MERGED)

    def unmerge(self) -> None:
        raise PrefixMemoryError(WHY_NOT_MERGED)


def _keep_as_buffers(memory: nn.Module) -> None:
    """Make buffers of the parameters that do not learn: the Trainer's files under ZeRO-3 hold no frozen parameters."""
    for module in memory.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.data)


def _parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """As ``module.parameters()``, which takes four times as long, for every adapter at every switch."""
    for parameter in module._parameters.values():
        if parameter is not None:
            yield parameter
    for child in module._modules.values():
        if child is not None:
            yield from _parameters(child)
