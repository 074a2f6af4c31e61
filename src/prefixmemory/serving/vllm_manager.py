"""The manager of a worker's adapters, which knows memories beside LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.utils import replace_submodule
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.memories.checkpoint import fingerprint, same_base_model
from prefixmemory.serving.bank import Step
from prefixmemory.serving.served import (
    ServedLayer,
    check_blocks,
    has_room_for_blocks,
    place_of,
    read_blocks,
    read_config,
    read_memory,
)  # fmt: skip
from prefixmemory.serving.vllm_blocks import MemoryProjection, find_projections
from prefixmemory.serving.vllm_layers import AROUND, MemoryAttention, ShownQuery, sizes_of

#: The child of an attention module that rotates queries.
ROTARY = "rotary_emb"


@dataclass(frozen=True)
class _OfLayer:
    """In the place of a layer's LoRA weights."""

    lora_a: ServedLayer | dict[str, ServedLayer]
    lora_b: None = None


class MemoryModel(LoRAModel):
    """A memory, in the place of a LoRA model."""


class MemoryModelManager(LRUCacheLoRAModelManager):
    """Holds memories in the slots of vLLM's manager of LoRA models, so that requests choose among both."""

    def _create_lora_modules(self) -> None:
        super()._create_lora_modules()
        attentions = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, MemoryAttention) or MemoryAttention.can_replace_layer(module, self.lora_config, [])
        }
        self.attentions: dict[int, tuple[str, MemoryAttention]] = {}
        self.blind: set[int] = set()  # layers whose queries are rotated where nothing shows them before
        self.parallel, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        self._pointed: Any = None
        width = max((module.num_heads * module.head_size for module in attentions.values()), default=0)
        dtype, device = next(self.model.parameters()).dtype, torch.device(current_platform.device_type)
        self.step = Step(self.max_num_batched_tokens, width, dtype, device)
        for name, module in attentions.items():
            around = module
            if not isinstance(around, MemoryAttention):
                around = MemoryAttention(module)
                around.create_lora_weights(self.lora_slots, self.lora_config)
                replace_submodule(self.model, name, around)
                self.register_module(name, around)
            around.stand_in(self.step, rank * around.num_heads)
            self._number(name, around)
        self.projections: dict[tuple[int, str], tuple[str, MemoryProjection]] = {}
        if has_room_for_blocks():
            for number, (name, around) in self.attentions.items():
                self._stand_beside(number, name[: name.index(f".{number}.") + len(f".{number}")], around)

    def _stand_beside(self, number: int, layer: str, around: MemoryAttention) -> None:
        """Make slots around the projections of a layer's feed-forward blocks."""
        attention = self.attentions[number][0].removeprefix(f"{layer}.").rpartition(".")[0]
        found = list(find_projections(self.model.get_submodule(layer), attention, self.packed_modules_mapping))
        for path, module, parts in found:
            name = f"{layer}.{path}"
            if not isinstance(module, BaseLayerWithLoRA) and self._match_target_modules(name):
                continue  # vLLM could not put its LoRA there, and warms up what it finds in its place
            projection = MemoryProjection(module, around, parts)
            projection.create_lora_weights(self.lora_slots, self.lora_config)
            replace_submodule(self.model, name, projection)
            self.register_module(f"{name}.{AROUND}", projection)  # LoRA's own layer may have the name
            for part in parts:
                self.projections[number, part] = f"{name}.{AROUND}", projection

    def _number(self, name: str, around: MemoryAttention) -> None:
        """Note a layer under its number, and have it shown queries before they are rotated."""
        numbers = [int(part) for part in name.split(".") if part.isdecimal()]
        parent = self.model.get_submodule(name.rpartition(".")[0])
        rotary = getattr(parent, ROTARY, None)
        if isinstance(rotary, nn.Module):
            setattr(parent, ROTARY, ShownQuery(rotary, around))
        if len(numbers) != 1 or numbers[0] in self.attentions:
            return  # a memory for it is refused when it is loaded
        if rotary is None and getattr(self.model.config, "rope_parameters", None):
            self.blind.add(numbers[0])
        self.attentions[numbers[0]] = name, around

    def load_memory(self, folder: Path, number: int) -> MemoryModel:
        """Read a saved memory.

        Raises:
            PrefixMemoryError: it cannot be served with this model; says why.
        """
        if not self.attentions:
            raise PrefixMemoryError(
                f"{type(self.model).__name__} has no attention that prefixmemory can serve memories in (its attention "
                "is of another kind, such as MLA). Use the memory through transformers."
            )
        config = read_config(folder)
        self._check_base_model(config.base_model_fingerprint, folder)
        around = next(iter(self.attentions.values()))[1]
        sizes = sizes_of(around.base_layer, self.model.config, self.parallel)
        layers = read_memory(folder, sizes, max(self.attentions) + 1, self.lora_config.max_lora_rank)
        if config.query == "content" and (unseen := self.blind & layers.keys()):
            raise PrefixMemoryError(
                f"{folder} reads the query before rotation, which layer {min(unseen)} of {type(self.model).__name__} "
                "does not show in vLLM. Train it with query='rotary', or use it through transformers."
            )
        weights: Any = {self.attentions[layer][0]: _OfLayer(served) for layer, served in layers.items()}
        blocks = read_blocks(folder, self.lora_config.max_lora_rank)
        check_blocks(blocks, None, folder)
        for module, served in blocks.items():
            name, path = self._projection(module, served, folder)
            if path in (here := weights.setdefault(name, _OfLayer({})).lora_a):
                raise PrefixMemoryError(
                    f"{folder} has two memories for {path} of layer {place_of(module)[0]}, one of them beside "
                    f"{module}. Use it through transformers."
                )
            here[path] = served
        ranks = [served.manner.rank for served in (*layers.values(), *blocks.values())]
        return MemoryModel(number, max(ranks), weights)

    def _projection(self, module: str, served: ServedLayer, folder: Path) -> tuple[str, str]:
        """Where the memory of a projection stands: the name of its slots, and its own among these."""
        number, path = place_of(module)
        name, projection = self.projections.get((cast(int, number), path), ("", None))
        if projection is None:
            here = sorted(part for layer, part in self.projections if layer == number)
            instead = "Use the memory through transformers."
            if self.parallel > 1:
                instead = "There may be more with --tensor-parallel-size 1; else use the memory through transformers."
            raise PrefixMemoryError(
                f"{folder} has a memory beside {module}. In that layer, vLLM's {type(self.model).__name__} has slots "
                f"for {', '.join(here) or 'none of its feed-forward block'}. {instead}"
            )
        (reads, returns), present = (served.A.shape[1], served.B.shape[2]), projection.sizes(path)
        if (reads, returns) != present:
            raise PrefixMemoryError(
                f"{folder}, {module}: a memory that reads {reads} numbers and returns {returns} does not fit the "
                f"served model's {present[0]} and {present[1]}. Serve it with the model that it was trained on."
            )
        return name, path

    def _check_base_model(self, saved: list[float | None] | None, folder: Path) -> None:
        embeddings = [module for module in self.model.modules() if isinstance(module, VocabParallelEmbedding)]
        if saved is None or not embeddings or self.parallel > 1:
            return
        present = fingerprint(_Embedding(embeddings[0]))
        if present is not None and not same_base_model(saved, present):
            raise PrefixMemoryError(
                f"{folder} was trained on another base model: its fingerprint differs. Serve it with that model, or "
                "set base_model_fingerprint to null in adapter_config.json to serve it with this one on purpose."
            )

    def _create_merged_loras_inplace(self, lora_model: LoRAModel) -> None:
        if lora_model.loras and not isinstance(lora_model, MemoryModel):  # an empty one warms up a model without LoRA
            super()._create_merged_loras_inplace(lora_model)

    def point(
        self, adapters: tuple[int, ...], silent: np.ndarray | None = None, scales: np.ndarray | None = None
    ) -> None:
        """Begin a step.

        Args:
            adapters: the number of each token's adapter, 0: none.
            silent, scales: as :class:`~prefixmemory.serving.vllm_requests.Marked` has them.
        """
        marks = [None if mark is None else mark.tobytes() for mark in (silent, scales)]
        now = (adapters, tuple(self.lora_index_to_id), *marks)
        if now == self._pointed:
            return
        self._pointed = now
        found = np.full(len(adapters), -1, dtype=np.int64)
        numbers = np.asarray(adapters)
        for slot, number in enumerate(self.lora_index_to_id):
            if number is not None and isinstance(self._registered_adapters.get(number), MemoryModel):
                found[numbers == number] = slot
        if silent is not None:
            found[silent] = -1
        self.step.point(torch.from_numpy(found), None if scales is None else torch.from_numpy(scales))


class _Embedding(nn.Module):
    """A model, as far as its fingerprint goes."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def get_input_embeddings(self) -> nn.Module:
        """The table of the input tokens."""
        return self.embedding
