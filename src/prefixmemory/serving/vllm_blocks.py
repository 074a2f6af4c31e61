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
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, RowParallelLinear
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from prefixmemory.attention.feed_forward import is_in_block
from prefixmemory.serving.bank import Cut, LayerBank
from prefixmemory.serving.served import ServedLayer
from prefixmemory.serving.vllm_layers import MemoryAttention, around_of, is_captured

#: The form of these memories: what a projection reads, as it is.
AS_IT_IS = ("identity", "none")


class MemoryProjection(BaseLayerWithLoRA):
    """One linear module, ``base_layer``, which may have LoRA around it, and the slots of its memories.

    Args:
        base_layer: the module.
        around: what stands around the attention of its layer, and knows the tokens' slots.
        parts: the projections that it computes, in order, by their names in the layer, as transformers has them, and
            how many numbers each returns; several, where it is itself of several, which processes cut one by one.
    """

    def __init__(self, base_layer: nn.Module, around: MemoryAttention, parts: Mapping[str, list[int]]) -> None:
        super().__init__()
        self.base_layer = base_layer
        linear = _linear(base_layer)
        self.reads, self.rank = int(linear.input_size), int(linear.tp_rank)
        self.parts = dict(parts)
        # among how many processes each has what is read, and what is returned
        self.shared = (
            int(linear.tp_size) if isinstance(linear, RowParallelLinear) and linear.input_is_parallel else 1,
            int(linear.tp_size) if isinstance(linear, ColumnParallelLinear) else 1,
        )
        self.place = next(iter(parts))
        self.__dict__["around"] = around  # past nn.Module.__setattr__: it is no child of ours
        around.beside[self.place] = self

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """Make the slots."""
        device = torch.device(current_platform.device_type)
        inputs, outputs = self.shared
        cut = Cut(inputs > 1, outputs > 1, tensor_model_parallel_all_reduce) if max(self.shared) > 1 else None
        made = (
            LayerBank(
                max_loras, lora_config.max_lora_rank, 1, self.reads // inputs, sum(returns) // outputs,
                lora_config.lora_dtype, device, only=AS_IT_IS, cut=cut,
            )
            for returns in self.parts.values()
        )  # fmt: skip
        self.slots = nn.ModuleList(made)  # in the order of the parts

    @property
    def banks(self) -> list[LayerBank]:
        """The slots of each part."""
        return cast(list[LayerBank], list(self.slots))

    def sizes(self, path: str) -> tuple[int, int]:
        """How many numbers a projection reads and returns."""
        return self.reads, sum(self.parts[path])

    def set_mapping(self, punica_wrapper: Any) -> None:
        """The mapping of LoRA layers is not used."""

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Put memories into a slot; ``lora_a`` has a :class:`ServedLayer` by the projection's name."""
        layers: dict[str, ServedLayer] = lora_a
        inputs, outputs = self.shared
        for (path, returns), bank in zip(self.parts.items(), self.banks, strict=True):
            if path not in layers:
                bank.clear(index)
            elif inputs == outputs == 1:
                bank.put(index, layers[path])
            else:
                here = self._share([self.reads], inputs), self._share(returns, outputs)
                bank.put(index, layers[path].of_part(*here))

    def _share(self, sizes: list[int], processes: int) -> Tensor:
        """The places of what this process has, where groups of these sizes are cut among ``processes``."""
        rank = self.rank if processes > 1 else 0
        return torch.cat([group.chunk(processes)[rank] for group in torch.arange(sum(sizes)).split(sizes)])

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
        own = outputs.split([bank.value_dim for bank in self.banks], dim=1)
        for here, bank in zip(own, self.banks, strict=True):
            bank.add_(here, read, read, self.around.step, captured)


def find_projections(
    layer: nn.Module, attention: str, packed: Mapping[str, list[str]]
) -> Iterator[tuple[str, nn.Module, dict[str, list[int]]]]:
    """The linear modules of the feed-forward blocks of a layer: name in it, module, and what it computes, as
    :class:`MemoryProjection` has it.

    Args:
        layer: of vLLM's model.
        attention: the name in it of what holds its attention.
        packed: the projections that vLLM computes as one, by the name of that module.
    """
    for path, module in layer.named_modules():
        linear, name = _linear(module), path.rpartition(".")[2]
        if linear is None or name == "base_layer" or not is_in_block(path) or path.startswith(f"{attention}."):
            continue
        if (linear.skip_bias_add and linear.bias is not None) or not _is_cut_as_known(linear):
            continue  # what it returns is not yet what the projection says
        sizes, names = list(getattr(linear, "output_sizes", ())) or [int(linear.output_size)], packed.get(name, [])
        if 1 < len(names) == len(sizes):
            parts = {path.removesuffix(name) + own: [size] for own, size in zip(names, sizes, strict=True)}
        else:
            parts = {path: sizes}
        yield path, module, parts


def _is_cut_as_known(linear: Any) -> bool:
    """Whether a module is whole in each process, or cut among all of them, who have their sum or each a part.

    One that is not cut on purpose may read other tokens in each (experts that are sequence-parallel).
    """
    if linear.tp_size != get_tensor_model_parallel_world_size():
        return False
    if linear.tp_size == 1:
        return True
    if isinstance(linear, RowParallelLinear):
        return bool(linear.reduce_results)
    return not (isinstance(linear, ColumnParallelLinear) and linear.gather_output)


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
