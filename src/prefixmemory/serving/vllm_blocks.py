"""Around each projection of the feed-forward blocks of a vLLM model: adds what the memories of the batch say to what it
returns.

vLLM may compute several projections as one (gate and up): each keeps slots of its own. The slots cost memory and every
step some time, whether memories fill them or not; so they are made only where ``FEED_FORWARD`` asks for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.linear import LinearBase
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from prefixmemory.attention.feed_forward import is_in_block
from prefixmemory.serving.bank import LayerBank
from prefixmemory.serving.served import ServedLayer
from prefixmemory.serving.vllm_layers import MemoryAttention, around_of, is_captured

#: The form of these memories: what a projection reads, as it is.
AS_IT_IS = ("identity", "none")


class MemoryProjection(BaseLayerWithLoRA):
    """One linear module, ``base_layer``, which may have LoRA around it, and the slots of its memories.

    Args:
        base_layer: the module.
        around: what stands around the attention of its layer, and knows the tokens' slots.
        parts: the projections that it computes by their names in the layer, as transformers has them, and which of the
            outputs are theirs.
    """

    def __init__(self, base_layer: nn.Module, around: MemoryAttention, parts: Mapping[str, slice]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.reads = int(_linear(base_layer).input_size)
        self.parts = dict(parts)
        self.place = next(iter(parts))
        self.__dict__["around"] = around  # past nn.Module.__setattr__: it is no child of ours
        around.beside[self.place] = self

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """Make the slots."""
        device = torch.device(current_platform.device_type)
        made = (
            LayerBank(
                max_loras, lora_config.max_lora_rank, 1, self.reads, here.stop - here.start, lora_config.lora_dtype,
                device, only=AS_IT_IS,
            )
            for here in self.parts.values()
        )  # fmt: skip
        self.slots = nn.ModuleList(made)  # in the order of the parts

    @property
    def banks(self) -> list[LayerBank]:
        """The slots of each part."""
        return cast(list[LayerBank], list(self.slots))

    def sizes(self, path: str) -> tuple[int, int]:
        """How many numbers a projection reads and returns."""
        return self.reads, self.parts[path].stop - self.parts[path].start

    def set_mapping(self, punica_wrapper: Any) -> None:
        """The mapping of LoRA layers is not used."""

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Put memories into a slot; ``lora_a`` has a :class:`ServedLayer` by the projection's name."""
        layers: dict[str, ServedLayer] = lora_a
        for path, bank in zip(self.parts, self.banks, strict=True):
            if path in layers:
                bank.put(index, layers[path])
            else:
                bank.clear(index)

    def reset_lora(self, index: int) -> None:
        """Empty a slot."""
        for bank in self.banks:
            bank.clear(index)

    def forward(self, read: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the module returns, and what memories add."""
        returned = self.base_layer(read, *args, **kwargs)
        output = returned[0] if isinstance(returned, tuple) else returned
        attention = self.around.base_layer
        if attention.use_direct_call:
            self.add_(output, read)
        else:
            torch.ops.vllm.prefix_memory_beside(output, read, attention.layer_name, self.place)
        return returned

    def add_(self, output: Tensor, read: Tensor) -> None:
        """Add to the module's ``output``, in place."""
        outputs, read = output.view(-1, output.shape[-1]), read.reshape(-1, read.shape[-1])
        captured = is_captured(output)
        for here, bank in zip(self.parts.values(), self.banks, strict=True):
            bank.add_(outputs[:, here], read, read, self.around.step, captured)


def find_projections(
    layer: nn.Module, attention: str, packed: Mapping[str, list[str]]
) -> Iterator[tuple[str, nn.Module, dict[str, slice]]]:
    """The linear modules of the feed-forward blocks of a layer: name in it, module, and the projections it computes.

    Args:
        layer: of vLLM's model.
        attention: the name in it of what holds its attention.
        packed: the projections that vLLM computes as one, by the name of that module.
    """
    for path, module in layer.named_modules():
        linear, name = _linear(module), path.rpartition(".")[2]
        if linear is None or name == "base_layer" or not is_in_block(path) or path.startswith(f"{attention}."):
            continue
        if linear.skip_bias_add and linear.bias is not None:
            continue  # what it returns is not yet what the projection says
        outputs, names = [int(linear.output_size)], packed.get(name, [])
        if len(names) > 1 and len(names) == len(sizes := list(getattr(linear, "output_sizes", ()))):
            outputs = sizes
        else:
            names = [name]
        parts, start = {}, 0
        for own, size in zip(names, outputs, strict=True):
            parts[path.removesuffix(name) + own] = slice(start, start + size)
            start += size
        yield path, module, parts


def _linear(module: nn.Module) -> Any:
    inner = module.base_layer if isinstance(module, BaseLayerWithLoRA) else module
    return inner if isinstance(inner, LinearBase) else None


def register_operation() -> None:
    """Make the operation known to PyTorch; once in a process."""
    if not hasattr(torch.ops.vllm, "prefix_memory_beside"):
        direct_register_custom_op("prefix_memory_beside", _beside, mutates_args=["output"], fake_impl=_nothing)


def _beside(output: Tensor, read: Tensor, layer: str, place: str) -> None:
    around_of(layer).beside[place].add_(output, read)


def _nothing(output: Tensor, read: Tensor, layer: str, place: str) -> None:
    pass
