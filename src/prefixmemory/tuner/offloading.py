"""Memories where accelerate offloads the base model to main memory or disk: they stay on the device that computes.

PEFT dispatches a model again when its first adapter has been loaded into it. accelerate then takes the memories'
tensors away too, and on disk it looks for them among the base model's files. They are put aside before, and put back
after.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prefixmemory.tuner.layers import memory_layers, named_memory_layers


def put_aside(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Keep what is loaded into memories, ``tensors`` by their names in ``model``, if it is partly offloaded."""
    places: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    if not {"cpu", "disk"}.intersection(map(str, places.values())):
        return
    for path, layer in named_memory_layers(model):
        start = f"{path}."
        layer.put_aside = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def put_back(model: nn.Module) -> None:
    """Give memories what was put aside of them and has been taken away since."""
    for layer in memory_layers(model):
        kept, layer.put_aside = layer.put_aside, {}
        if not kept or not any(parameter.is_meta for parameter in layer.parameters()):
            continue
        from accelerate.hooks import remove_hook_from_module

        dtypes = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
        device = layer._get_base_layer_device_and_dtype(layer.get_base_layer())[0] or torch.device("cpu")
        layer.load_state_dict(
            {n: t.to(device, dtypes[n], copy=True) for n, t in kept.items()}, strict=False, assign=True
        )
        remove_hook_from_module(layer, recurse=True)
