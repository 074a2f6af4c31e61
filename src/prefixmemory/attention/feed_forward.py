"""Finding the feed-forward blocks beside attention: their projections, as places for memories.

A feed-forward block is a key-value memory itself, f(xK)V (Geva et al., 2012.14913). A memory beside each of its
projections reads what the projection reads, and adds to what it returns. Experts have none of their own: they lie in
one tensor, or each reads the tokens that chose it. Where a block has nothing else, one stands beside the whole block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from prefixmemory.attention.families import ATTENTION
from prefixmemory.attention.sites import CHILD, AttentionSite

#: Names, within a layer, of feed-forward blocks or of their projections.
BLOCKS = re.compile(
    r"(block_sparse_)?moe|\w*mlp\w*|\w*ffn\w*|feed_?forward\w*|ff|fc\w*|intermediate|output|DenseReluDense|wi(_\d)?|wo"
    r"|lin[12]|linear[12]|dense_(h_to_4h|4h_to_h)|(gate|up|down|gate_up)_proj|\w*expert\w*"
)
#: Names of what chooses experts, or weighs them.
ROUTERS = re.compile(r"gate|router|\w*_gate")
#: Names of these, of what normalises in front of a block, or adapts it (Zamba 2).
NOT_IN_BLOCKS = re.compile(rf"{ROUTERS.pattern}|\w*norm\w*|\w*adapter\w*")
#: Names of lists of experts: each reads the tokens that chose it, so that nobody can say whose they are.
EXPERTS = re.compile(r"\w*experts?")


@dataclass(frozen=True)
class FeedForwardSite:
    """One projection of a feed-forward block, or a whole block of experts.

    Attributes:
        module: it reads ``[.., reads]`` and returns ``[.., returns]``, a block perhaps among other things.
        reads, returns: numbers of features.
        parent, name: the module that holds it, and its name there; ``None``: nobody asked for them.
    """

    module: nn.Module
    reads: int
    returns: int
    parent: nn.Module | None = None
    name: str = ""

    def intact(self) -> bool:
        """Whether the module is still where it was found, or what stands there has wrapped it (LoRA)."""
        present = None if self.parent is None else self.parent._modules.get(self.name)
        return self.parent is None or self.module in (present, getattr(present, "base_layer", None))

    def attach(self, layer: nn.Module) -> None:
        """Hang a memory layer into the module."""
        setattr(self.module, CHILD, layer)

    def detach(self) -> None:
        """Take it out again."""
        delattr(self.module, CHILD)


def feed_forward_site(module: nn.Module, parent: nn.Module | None = None, name: str = "") -> FeedForwardSite | None:
    """Describe a projection, or a block with experts in it; ``None``: it is neither."""
    widths = _widths(module)
    if widths is None and (width := _width_of_router(module)):
        widths = width, width
    return None if widths is None else FeedForwardSite(module, *widths, parent, name)


def find_feed_forward(model: nn.Module, attention: Mapping[str, AttentionSite]) -> dict[str, FeedForwardSite]:
    """The feed-forward projections of the layers in which the sites ``attention`` stand, by module name.

    Layers are the outermost items of a list that hold attention; a layer without any that is known has none. Where no
    layer of a list has one, since each is either attention or feed-forward (Nemotron-H, XLM): those in that list, and
    in the lists beside it.
    """
    outputs = {id(site.output_projection) for site in attention.values()}
    by_model: dict[str | None, dict[str, None]] = {}  # what holds the list, and its layers
    for name in attention:
        layer = _layer_of(model, name)
        above = layer.rpartition(".")[0]
        listed = isinstance(model.get_submodule(above), nn.ModuleList)
        by_model.setdefault(above.rpartition(".")[0] if listed else None, {})[layer] = None
    found: dict[str, FeedForwardSite] = {}
    for holder, layers in by_model.items():
        found |= dict(_within(model, layers, outputs)) or dict(_in_lists(model, holder, outputs))
    return found


def is_in_block(path: str) -> bool:
    """Whether ``path``, a module's name within its layer, is that of a feed-forward block or of something in one."""
    parts = path.split(".")
    return any(BLOCKS.fullmatch(part) for part in parts) and not any(NOT_IN_BLOCKS.fullmatch(part) for part in parts)


def _layer_of(model: nn.Module, name: str) -> str:
    parts = name.split(".")
    for n in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:n])), nn.ModuleList):
            return ".".join(parts[: n + 1])
    return ".".join(parts[:-1])


def _within(model: nn.Module, names: Iterable[str], outputs: set[int]) -> Iterator[tuple[str, FeedForwardSite]]:
    for name in names:
        yield from _in_blocks(model.get_submodule(name), outputs, name)


def _in_lists(model: nn.Module, holder: str | None, outputs: set[int]) -> Iterator[tuple[str, FeedForwardSite]]:
    """Those of the lists that ``holder`` has; ``None``: it is not known."""
    for name, child in () if holder is None else model.get_submodule(holder).named_children():
        if isinstance(child, nn.ModuleList):
            path = f"{holder}.{name}" if holder else name
            yield from _in_blocks(child, outputs, path, inside=bool(BLOCKS.fullmatch(name)))


def _in_blocks(
    module: nn.Module, outputs: set[int], path: str = "", inside: bool = False
) -> Iterator[tuple[str, FeedForwardSite]]:
    """The sites of the blocks in ``module``, or, where it is ``inside`` of one, of it and what it holds."""
    if inside and (widths := _widths(module)) is not None:
        yield path, FeedForwardSite(module, *widths)
        return
    for name, child in module._modules.items():
        if child is None or id(child) in outputs or name == CHILD or NOT_IN_BLOCKS.fullmatch(name):
            continue
        if ATTENTION.search(type(child).__name__) and _widths(child) is None:
            continue
        if isinstance(child, nn.ModuleList | nn.ModuleDict) and EXPERTS.fullmatch(name):
            continue
        here = f"{path}.{name}" if path else name
        is_block = not inside and bool(BLOCKS.fullmatch(name))
        found = list(_in_blocks(child, outputs, here, inside or is_block))
        if is_block and not found and (whole := feed_forward_site(child)) is not None:
            found = [(here, whole)]
        yield from found


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """How many features a projection reads and returns, or a block whose experts lie in one tensor."""
    for reads, returns in (("in_features", "out_features"), ("nx", "nf")):  # the latter: transformers' Conv1D
        widths = getattr(module, reads, None), getattr(module, returns, None)
        if isinstance(widths[0], int) and isinstance(widths[1], int):
            return widths[0], widths[1]
    width = _width_of_experts(module)
    return (width, width) if width else None


def _width_of_router(block: nn.Module) -> int | None:
    """The features that a block reads, if something in it chooses experts by them, whatever these are made of."""
    routers = [child for name, child in block.named_children() if ROUTERS.fullmatch(name)]
    sizes = (getattr(module, "in_features", None) for router in routers for module in router.modules())
    return next((size for size in sizes if isinstance(size, int)), None)


def _width_of_experts(module: nn.Module) -> int | None:
    """The features that a block of experts reads, if they lie in parameters ``[experts, ..]`` and not in modules."""
    for child in (module, *module.children()):
        stacked: Any = [p for p in child.parameters(recurse=False) if p.ndim == 3]
        if len(stacked) >= 2:
            sizes = [set(p.shape[1:]) for p in stacked]
            hidden = getattr(child, "hidden_size", None) or getattr(child, "hidden_dim", None)
            common = set.intersection(*sizes)
            return hidden if hidden in common else min(common, default=None)
    return None
