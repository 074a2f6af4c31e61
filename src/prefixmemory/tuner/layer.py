"""The memory layer: hangs in one attention module, reads its query, adds to its heads' outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from prefixmemory._shapes import Float
from prefixmemory.attention.prepending import Prefix, in_front
from prefixmemory.attention.sites import AttentionSite, placement
from prefixmemory.errors import PrefixMemoryError, check_number
from prefixmemory.memories.matrix import Memory
from prefixmemory.memories.prefix import PrefixVectors
from prefixmemory.memories.registry import ContextMemory, OwnMemory
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
    modules, their names and its state-dict keys.
    """

    site: AttentionSite
    live_site: AttentionSite
    adapter_layer_names = ("prefix_memory_bank",)
    other_param_names = ("scale",)

    def __init__(self, site: AttentionSite, share: HeadShare | None = None) -> None:
        super().__init__()
        self.share = share
        self.prefix_memory_bank = nn.ModuleDict()
        self.scale: dict[str, float] = {}
        self.content_query: Tensor | None = None
        self.rotary_query: Tensor | None = None
        self.was_read = self.was_inside = False  # in the pass that is going on
        self.row_beams = 1
        self.row_adapters: list[str] | None = None  # one adapter name per row of the batch, during such a call only
        self._active_adapter: list[str] = []
        # past nn.Module.__setattr__: the attention module is our parent, not our child
        self.__dict__["site"] = site
        self.__dict__["live_site"] = site if share is None else share.of_site(site)  # what a forward pass shows
        self._handles = site.hook(self._start, self._take_query, self._add_read, self._check_read)
        site.attach(self)

    def __getstate__(self) -> dict[str, Any]:
        # A forward pass that was broken off leaves its query behind; copies must not take it along.
        return {**self.__dict__, "content_query": None, "rotary_query": None}

    def detach(self) -> None:
        """Remove the hooks and leave the attention module as it was found."""
        for handle in self._handles:
            handle.remove()
        self.site.detach()

    def active_names(self) -> list[str]:
        """Names of the active adapters."""
        return cast(list[str], self.active_adapters)

    def memory(self, adapter_name: str) -> ContextMemory:
        """The memory, or the prefix vectors, of one adapter."""
        return cast(ContextMemory, self.prefix_memory_bank[adapter_name])

    # What happens in a forward pass

    def _start(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module is not self.site.module:
            raise PrefixMemoryError(
                "nn.DataParallel runs copies of the model in threads, whose queries would mix in one memory. Start one "
                "process a GPU with torchrun or accelerate launch, or use one GPU: CUDA_VISIBLE_DEVICES=0."
            )
        self.content_query = self.rotary_query = None  # a pass that was broken off may have left one
        self.was_read = self.was_inside = False

    def on_attention(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, is_causal: bool | None, implementation: str
    ) -> tuple[Tensor, Tensor, Any]:
        """Called before the attention function: keeps the rotated query; returns keys, values and mask, with the
        prefix of the adapters inside the softmax in front of them."""
        self.rotary_query = query.transpose(1, 2)  # [B, H, T, D] -> [B, T, H, D]
        self.was_inside = True
        prefix = None if self.disable_adapters else self._prefix(key.shape[0])
        if prefix is None:
            return key, value, mask
        counts_from_end = "flash" in implementation
        return in_front(prefix, self.site.core, query, key, value, mask, is_causal, counts_from_end)

    def _prefix(self, batch: int) -> Prefix | None:
        """The prefixes of the adapters inside the softmax, one behind the other; ``None`` if there are none."""
        rows = self.row_adapters
        names = self.answering() if rows is None else self._answering(dict.fromkeys(rows))
        inside = [name for name in names if self.memory(name).inside]
        if not inside:
            return None
        keys, values = zip(*(cast(PrefixVectors, self.memory(name)).vectors() for name in inside), strict=True)
        dose = None
        if rows is not None or any(self.scale[name] != 1 for name in inside):
            own = [torch.full((k.shape[1],), math.log(self.scale[n])) for n, k in zip(inside, keys, strict=True)]
            dose = torch.cat(own).to(keys[0].device)[None]
            if rows is not None:
                beams = self._beams(batch, rows)
                belongs = [[name == row for name, k in zip(inside, keys, strict=True) for _ in k[0]] for row in rows]
                here = torch.tensor(belongs, device=dose.device).repeat_interleave(beams, dim=0)
                dose = dose.masked_fill(~here, -torch.inf)
        return Prefix(torch.cat(keys, dim=1)[None], torch.cat(values, dim=1)[None], dose)

    def _take_query(self, module: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Any, ...]) -> None:
        # the first alone: some project further vectors later on (DeBERTa v2: relative positions)
        if self.content_query is None and not self.disable_adapters:
            self.content_query = self.live_site.query_from(output, args[0])

    def _add_read(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self.site.intact():
            raise PrefixMemoryError(
                f"A projection of {type(self.site.module).__name__} was wrapped or replaced after its memory was "
                "made, so the memory would read and write beside it. Make the memory last: inject LoRA first, and "
                "keep modules_to_save outside of attention."
            )
        heads, *rest = args
        self.was_read = True
        queries: dict[str, Tensor] = {}
        left: dict[str, Tensor | None] = {}
        wanted = {self.memory(name).query for name in self.prefix_memory_bank if not self.disable_adapters}
        for kind, query in (("content", self.content_query), ("rotary", self.rotary_query)):
            if query is not None and kind in wanted:
                queries[kind], left[kind] = self.live_site.take(query, heads)
        self.content_query, self.rotary_query = left.get("content"), left.get("rotary")
        if not self.was_inside and any(self.memory(name).inside for name in self.answering()):
            raise PrefixMemoryError(
                f"{type(self.site.module).__name__} did not call its attention function through transformers' "
                "interface, so its prefix inside the softmax was passed by. Exclude it with exclude_modules."
            )
        read = self._read(queries, heads)
        return args if read is None else (heads + read.reshape(heads.shape).to(heads.dtype), *rest)

    def _check_read(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.disable_adapters or not self.answering():
            return
        if not self.was_read or self.content_query is not None:
            raise PrefixMemoryError(
                f"{type(module).__name__} finished without its output projection reading every head's output, so its "
                "memory was passed by. Its forward is not one that prefixmemory knows; exclude it with exclude_modules."
            )

    def _query(self, kind: str, queries: Mapping[str, Tensor]) -> Tensor:
        if kind not in queries:
            raise PrefixMemoryError(
                f"{type(self.site.module).__name__} reached its output projection without showing a {kind} query. "
                "Its forward is not one that prefixmemory knows; exclude it with exclude_modules."
            )
        return queries[kind]

    def _read(self, queries: Mapping[str, Tensor], heads: Tensor) -> Float[Tensor, "*batch h v"] | None:
        """Σ over adapters of scale·φ(q)ᵀM, or ``None`` when no adapter has anything to add."""
        if self.disable_adapters:
            return None
        if self.row_adapters is not None:
            return self._read_by_row(self.row_adapters, queries, heads)
        return self._sum(
            self.scale[name] * self._answer(name, self._query(self.memory(name).query, queries), heads)
            for name in self._outside(self.active_names())
        )

    def _answer(self, name: str, query: Tensor, heads: Tensor) -> Tensor:
        """What one adapter adds to the heads' outputs ``heads``, ``[batch, tokens, heads, value_dim]``."""
        memory = self.memory(name)
        answer = memory(query) if self.share is None else self.share.read(cast(Memory, memory), query)
        if memory.mixing is not None:
            answer = memory.mixing(answer, heads.reshape(answer.shape))
        return answer

    def answering(self) -> list[str]:
        """The active adapters whose scale is not 0."""
        return self._answering(self.active_names())

    def _answering(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name in self.prefix_memory_bank and self.scale[name] != 0]

    def _outside(self, names: Iterable[str]) -> list[str]:
        return [name for name in self._answering(names) if not self.memory(name).inside]

    @staticmethod
    def _sum(reads: Iterable[Tensor]) -> Tensor | None:
        total = None
        for read in reads:
            total = read if total is None else total + read
        return total

    def _beams(self, batch: int, names: Sequence[str]) -> int:
        """Rows of the batch for each of ``names``: generate() repeats a row for its beams."""
        if batch not in (len(names), len(names) * self.row_beams):
            raise PrefixMemoryError(
                f"adapter_names has {len(names)} entries for a batch of {batch} rows: give one a row."
            )
        return batch // len(names)

    def _read_by_row(self, names: Sequence[str], queries: Mapping[str, Tensor], heads: Tensor) -> Tensor | None:
        """A different adapter for each row: ``names`` has one entry a row, or a row has several beams."""
        total: Tensor | None = None
        for name in self._outside(dict.fromkeys(names)):
            query = self._query(self.memory(name).query, queries)
            beams = self._beams(query.shape[0], names)
            rows = torch.tensor([n == name for n in names], device=query.device).repeat_interleave(beams)
            read = self.scale[name] * self._answer(name, query[rows], heads.reshape(*query.shape[:2], -1)[rows])
            if total is None:
                total = read.new_zeros(*query.shape[:-1], read.shape[-1])
            total[rows] = read.to(total.dtype)
        return total

    # PEFT's lifecycle

    def update_layer(self, adapter_name: str, memory: Memory | PrefixVectors | OwnMemory, scale: float) -> None:
        """Add a memory under ``adapter_name``."""
        self.prefix_memory_bank[adapter_name] = memory
        self.scale[adapter_name] = scale
        BaseTunerLayer._move_adapter_to_device_of_base_layer(self, adapter_name)
        BaseTunerLayer.set_adapter(self, self.active_names())

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


def memory_layers(model: nn.Module) -> list[PrefixMemoryLayer]:
    """All memory layers of a model, in its order."""
    return [module for module in model.modules() if isinstance(module, PrefixMemoryLayer)]


def set_scale(model: nn.Module, scale: float, adapter_name: str | None = None) -> None:
    """Set the dose of a memory at run time; 0 gives the base model exactly.

    Args:
        model: any model that holds memories, wrapped by PEFT or not.
        scale: factor on φ(q)ᵀM. A saved adapter keeps the scale of its config.
        adapter_name: which adapter; ``None`` means all active ones.
    """
    check_number("scale", scale)
    layers = memory_layers(model)
    known = {name for layer in layers for name in layer.prefix_memory_bank}
    if not known:
        raise PrefixMemoryError(f"{type(model).__name__} holds no memory. Make one with get_peft_model first.")
    if adapter_name is not None and adapter_name not in known:
        raise PrefixMemoryError(f"There is no memory called {adapter_name!r}; there are: {sorted(known)}.")
    for layer in layers:
        for name in layer.active_names() if adapter_name is None else [adapter_name]:
            if name in layer.scale:
                if scale < 0 and layer.memory(name).inside:
                    raise PrefixMemoryError(f"scale={scale} is out of range: inside the softmax, give 0 or more.")
                layer.scale[name] = float(scale)
