"""The means of features, taken over the first batch that is trained on.

What is the same in φ(q) for every token would make a memory say the same to every text; a memory with a ``mean``
subtracts it (``docs/LOG.md``). It is taken once, before the first step, in a pass of its own over that batch, without
gradients and in evaluation mode. Nothing has been learned by then, so that no output changes; a memory that has learned
without a mean goes on without one. A loop may train in evaluation mode: every batch that gradients are asked for then
gives the means anew, until something has been learned, for it may be the first one.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.memories.registry import lacks_mean, whole
from prefixmemory.models.modes import evaluating
from prefixmemory.tuner.layer import PrefixMemoryLayer
from prefixmemory.tuner.layers import holders, memory_layers


class FirstBatch:
    """Waits at a model for the first batch that each of its new adapters is trained on; there is one a model.

    It stands before the model and the parts of it that hold all memory layers, since some trainers call such a part
    alone; when no adapter waits any more, it is gone.
    """

    def __init__(self, model: nn.Module, adapter: str) -> None:
        layers = memory_layers(model)
        before = next((layer.first_batch for layer in layers if layer.first_batch is not None), None)
        self._waiting = {adapter} if before is None else before.leave() | {adapter}
        self._not_yet: set[str] = set()  # of these, the adapters whose means are those of a batch that may be no first
        self._layers = layers
        for layer in layers:
            layer.first_batch = self
        self._tried: set[Any] = set()  # what batches had that passed a memory of these adapters by
        self._holders = list(holders(model))
        self._outermost = len(self._holders)  # of those that were called in evaluation mode; the others are within
        self._handles = [
            module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True) for module in self._holders
        ]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not torch.is_grad_enabled() or (several and not module.training):  # one process may look at something alone
            return
        place, batch = 0, None
        if not torch.compiler.is_compiling():
            place = next(number for number, holder in enumerate(self._holders) if holder is module)
            by_name = frozenset(name for name, value in kwargs.items() if value is not None)
            batch = place, tuple(value is not None for value in args), by_name, frozenset(self._asked())
            if batch in self._tried:
                return
        if not module.training:
            if batch is None or place > self._outermost:
                return
            self._outermost = place
        if self._asked():
            self._take(module, args, kwargs)
            if batch is not None and module.training and not several and self._asked():
                self._tried.add(batch)  # text alone, in a model that also sees: no pass a step for what it passes by

    def _asked(self) -> set[str]:
        """The adapters that wait and answer."""
        layers = [layer for layer in self._layers if not layer.disable_adapters]
        return {name for layer in layers for name in layer.answering() if name in self._waiting}

    @torch.compiler.disable(  # type: ignore[untyped-decorator]
        reason="call prefixmemory.calibrate(model, **batch) before the first compiled step, which takes the means"
    )
    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen, given = take_means(module, args, kwargs, self._not_yet)
        if not module.training:
            self._not_yet |= given
            seen -= given
        self.seen(seen)

    def seen(self, adapters: set[str]) -> None:
        """These adapters have what they waited for."""
        self._waiting -= adapters
        if not self._waiting:
            self.leave()

    def leave(self) -> set[str]:
        """Wait no longer; the adapters that still do."""
        for handle in self._handles:
            handle.remove()
        for layer in self._layers:
            layer.first_batch = None
        return self._waiting


def calibrate(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Take the means of features over one batch, as the first step of training would.

    Needed only where that step cannot do it: ``torch.compile(model, fullgraph=True)`` allows nothing beside the graph.
    Memories that have a mean, or have learned without one, keep what they have. Processes that train together must all
    call it, each with its part of the batch.

    Args:
        model: holds memories, wrapped by PEFT or not.
        args, kwargs: a batch, as ``model`` is called with it.

    Raises:
        PrefixMemoryError: the model holds no memory.
    """
    layers = memory_layers(model)
    if not layers:
        raise PrefixMemoryError(f"{type(model).__name__} holds no memory. Make one with get_peft_model first.")
    seen, _ = take_means(model, args, kwargs)
    if layers[0].first_batch is not None:
        layers[0].first_batch.seen(seen)


class _Sums:
    """Sums of the features of one memory, ``[groups, features]``, and how many there were, ``[groups]``."""

    def __init__(self, mean: Tensor) -> None:
        self.sums = torch.zeros(mean.shape, device=mean.device, dtype=torch.float32)
        self.counts = torch.zeros(mean.shape[0], device=mean.device, dtype=torch.float32)
        self.has_learned = False

    def add(self, layer: PrefixMemoryLayer, memory: nn.Module, args: tuple[Tensor, ...], answer: Tensor) -> None:
        """A forward hook on the memory."""
        self.has_learned |= bool(answer.any())
        mean = cast(Tensor, memory.mean)  # the part of a tensor-parallel process
        by_group = [query.to(mean.dtype).unflatten(-2, (mean.shape[0], -1)) for query in args]
        features = cast(Any, memory).features(*by_group).float().flatten(end_dim=-4)
        sound = features.isfinite().all(dim=-1)  # a row that is all padding may have no finite query
        first = 0 if layer.share is None else layer.share.rank * mean.shape[0]
        here = slice(first, first + mean.shape[0])
        self.sums[here] += torch.where(sound[..., None], features, 0.0).sum(dim=(0, 2)).to(self.sums.device)
        self.counts[here] += sound.sum(dim=(0, 2)).to(self.counts.device)


def take_means(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], anew: Collection[str] = ()
) -> tuple[set[str], set[str]]:
    """Give the active memories that wait for one the mean of their features over one call of ``module``; those of the
    adapters ``anew`` another one, unless they have learned something.

    Processes that train together, each on its part of the batch or with its part of the heads, take the mean of all.

    Returns:
        The active adapters that need no further call, since no memory of theirs was passed by; and those that were
        given means.
    """
    seen, given = set[str](), set[str]()
    waiting: list[tuple[str, nn.Module, _Sums]] = []
    handles = []
    for layer in memory_layers(module):
        for name in layer.answering() if not layer.disable_adapters else []:
            seen.add(name)
            memory = layer.memory(name)
            if lacks_mean(memory) or (name in anew and getattr(memory, "mean", None) is not None):
                sums = _Sums(whole(cast(Tensor, memory.mean)))
                waiting.append((name, memory, sums))
                handles.append(memory.register_forward_hook(partial(_add, sums, layer)))
    if not waiting:
        return seen, given
    devices = {sums.sums.device for _, _, sums in waiting}
    cuda = [device for device in devices if device.type == "cuda"]  # not every one of the machine
    try:
        with torch.no_grad(), evaluating(module), torch.random.fork_rng(cuda):
            module(*args, **{key: _own(value) for key, value in kwargs.items()})
    finally:
        for handle in handles:
            handle.remove()
    _add_up([sums for _, _, sums in waiting])
    for part in module.modules():
        if hasattr(part, "reshard"):  # FSDP2: what it has gathered is not what it keeps
            cast(Any, part).reshard()
    for name, memory, sums in waiting:
        if not sums.counts.any():
            seen.discard(name)
        elif not sums.has_learned:
            given.add(name)
            _set(cast(Tensor, memory.mean), sums.sums / sums.counts.clamp(min=1.0)[:, None])
    return seen, given


def _add(sums: _Sums, layer: PrefixMemoryLayer, memory: nn.Module, args: tuple[Tensor, ...], answer: Tensor) -> None:
    sums.add(layer, memory, args, answer)


def _own(value: Any) -> Any:
    """A cache of its own: the pass would fill the caller's."""
    return copy.deepcopy(value) if hasattr(value, "get_seq_length") else value


def _add_up(all_sums: list[_Sums]) -> None:
    """Over all processes, in one go: one of them may have passed a layer by."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    device = all_sums[0].sums.device
    tensors = [tensor for sums in all_sums for tensor in (sums.sums, sums.counts)]
    flat = torch.cat([tensor.flatten().to(device) for tensor in tensors])
    learned = torch.tensor([float(sums.has_learned) for sums in all_sums], device=device)
    dist.all_reduce(flat)
    dist.all_reduce(learned)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))
    for sums, flag in zip(all_sums, learned.tolist(), strict=True):
        sums.has_learned = flag > 0


@torch.no_grad()
def _set(parameter: Tensor, value: Tensor) -> None:
    """Also where the parameter is spread over processes."""
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        spread = cast(Any, parameter)
        spread.copy_(distribute_tensor(value.to(parameter.dtype), spread.device_mesh, spread.placements))
    elif hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
    else:
        parameter.copy_(value)
