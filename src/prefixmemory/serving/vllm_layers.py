"""Around each decoder attention of a vLLM model: adds what the memories of the batch say to the heads' outputs.

vLLM rotates queries in place before attention, so that a memory which reads the query before rotation is shown it where
the model calls its rotary embedding. Both steps are opaque operations for compilers: what they do depends on the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionType

from prefixmemory.serving.bank import LayerBank, Step
from prefixmemory.serving.served import HeadSizes, ServedLayer

#: Under this name an attention module knows what stands around it.
AROUND = "prefix_memory"


class MemoryAttention(BaseLayerWithLoRA):
    """One attention module, ``base_layer``, and the slots of its memories."""

    step: Step
    first_head: int

    def __init__(self, base_layer: Attention) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.beside: dict[str, Any] = {}  # of the layer's feed-forward blocks, see ``vllm_blocks.py``
        base_layer.__dict__[AROUND] = self  # past nn.Module.__setattr__: it is our child

    @classmethod
    def can_replace_layer(
        cls, source_layer: nn.Module, lora_config: Any, packed_modules_list: list[str], model_config: Any = None
    ) -> bool:
        """Whether it is the self-attention of a decoder, with heads that read queries."""
        return (
            isinstance(source_layer, Attention)
            and source_layer.attn_type == AttentionType.DECODER
            and AROUND not in source_layer.__dict__
        )

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """Make the slots."""
        attention, device = self.base_layer, torch.device(current_platform.device_type)
        self.bank = LayerBank(
            max_loras, lora_config.max_lora_rank, attention.num_heads, attention.head_size, attention.head_size_v,
            lora_config.lora_dtype, device,
        )  # fmt: skip

    def stand_in(self, step: Step, first_head: int) -> None:
        """Take the slots of tokens from ``step``; the process has the heads from ``first_head`` on."""
        self.step, self.first_head = step, first_head
        self.register_buffer("shown", step.shown, persistent=False)

    def set_mapping(self, punica_wrapper: Any) -> None:
        """The mapping of LoRA layers is not used."""

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Put a memory into a slot; ``lora_a`` is a :class:`ServedLayer` of all heads."""
        layer: ServedLayer = lora_a
        self.bank.put(index, layer.of_heads(slice(self.first_head, self.first_head + self.base_layer.num_heads)))

    def reset_lora(self, index: int) -> None:
        """Empty a slot."""
        self.bank.clear(index)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attention, and what memories add."""
        output: Tensor = self.base_layer(query, key, value, *args, **kwargs)
        if self.base_layer.use_direct_call:
            self.add_(output, query)
        else:
            torch.ops.vllm.prefix_memory_add(output, query, self.shown, self.base_layer.layer_name)
        return output

    def add_(self, output: Tensor, query: Tensor) -> None:
        """Add to attention's ``output``, in place."""
        step, rotated = self.step, query.flatten(1) if query.ndim == 3 else query
        content = step.shown[:, : rotated.shape[1]] if step.shown_by == self.base_layer.layer_name else rotated
        self.bank.add_(output.view(output.shape[0], -1), rotated, content, step, is_captured(output))

    def show(self, query: Tensor) -> None:
        """Keep the query before it is rotated."""
        if self.base_layer.use_direct_call:
            self.keep(query)
        else:
            torch.ops.vllm.prefix_memory_show(query, self.shown, self.base_layer.layer_name)

    def keep(self, query: Tensor) -> None:
        """The same, now."""
        step = self.step
        if step.used or is_captured(query):
            step.shown_by = self.base_layer.layer_name
            query = query.flatten(1) if query.ndim == 3 else query
            step.shown[: query.shape[0], : query.shape[1]].copy_(query)


class ShownQuery(nn.Module):
    """A rotary embedding that shows queries to the memories of one attention module before it rotates them."""

    def __init__(self, rotary: nn.Module, memory: MemoryAttention) -> None:
        super().__init__()
        self.rotary = rotary
        self.__dict__["memory"] = memory  # past nn.Module.__setattr__: it is no child of ours

    def forward(self, positions: Tensor, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the rotary embedding returns."""
        self.memory.show(query)
        return self.rotary(positions, query, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("rotary"), name)


def sizes_of(attention: Attention, config: Any, parallel: int) -> HeadSizes:
    """The heads of an attention module over all processes."""
    kv_heads = attention.num_kv_heads * parallel
    total = getattr(config, "num_key_value_heads", None) or kv_heads
    return HeadSizes(attention.num_heads * parallel, min(kv_heads, total), attention.head_size, attention.head_size_v)


def register_operations() -> None:
    """Make the two operations known to PyTorch; once in a process."""
    if hasattr(torch.ops.vllm, "prefix_memory_add"):
        return
    direct_register_custom_op("prefix_memory_add", _add, mutates_args=["output"], fake_impl=_nothing)
    direct_register_custom_op("prefix_memory_show", _show, mutates_args=["shown"], fake_impl=_nothing_shown)


def _add(output: Tensor, query: Tensor, shown: Tensor, layer: str) -> None:
    around_of(layer).add_(output, query)


def _show(query: Tensor, shown: Tensor, layer: str) -> None:
    around_of(layer).keep(query)


def _nothing(output: Tensor, query: Tensor, shown: Tensor, layer: str) -> None:
    pass


def _nothing_shown(query: Tensor, shown: Tensor, layer: str) -> None:
    pass


def around_of(layer: str) -> MemoryAttention:
    """What stands around the attention module of that name."""
    memory: MemoryAttention = get_forward_context().no_compile_layers[layer].__dict__[AROUND]
    return memory


def is_captured(tensor: Tensor) -> bool:
    """Whether what is done with ``tensor`` is recorded."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
