"""Finding the feed-forward blocks beside attention: their projections, as places for memories.

A feed-forward block is a key-value memory itself, f(xK)V (Geva et al., 2012.14913). A memory beside each of its
projections reads what the projection reads, and adds to what it returns. Experts that lie in one tensor are no modules
(nor are those of which each reads the tokens that chose it): there the memory stands beside the whole block, as one
beside all of its experts.
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
#: Names of what chooses experts, weighs them, normalises in front of a block, or adapts it (Zamba 2).
NOT_IN_BLOCKS = re.compile(r"gate|router|\w*_gate|\w*norm\w*|\w*adapter\w*")
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
    such layer has one, since a layer is either attention or feed-forward (Nemotron-H, XLM): those of their model.
    """
    outputs = {id(site.output_projection) for site in attention.values()}
    layers = list(dict.fromkeys(_layer_of(model, name) for name in attention))
    models = dict.fromkeys(layer.rpartition(".")[0].rpartition(".")[0] for layer in layers if "." in layer)

    def within(names: Iterable[str]) -> dict[str, FeedForwardSite]:
        return {
            f"{name}.{path}" if name else path: site
            for name in names
            for path, site in _in_blocks(model.get_submodule(name), outputs)
        }

    return within(layers) or within(models)


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
        if isinstance(child, nn.ModuleList) and EXPERTS.fullmatch(name):
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
    routers = [child for name, child in block.named_children() if NOT_IN_BLOCKS.fullmatch(name)]
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
