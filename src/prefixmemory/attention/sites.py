"""One attention module, described: where its query is made, where its heads' outputs are read, and their sizes.

A memory needs three things of an attention module: the query of every head before rotation, the query as attention
sees it, and the place where the heads' outputs stand side by side, before the output projection. ``discovery.py`` finds
the first and the third by the tables of ``families.py``; the second comes through transformers' attention interface
(``interface.py``).

What a model does between attention and its output projection (a gate, a norm, a difference of heads) is done when a
memory adds its output: head ``n`` adds to the ``n``-th of the slices that the output projection reads. Nothing in the
base model is replaced: hooks read and add, and are removed again by ``unload``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prefixmemory.attention import families
from prefixmemory.errors import PrefixMemoryError

#: Name of the child under which a memory layer hangs in an attention module.
CHILD = "prefix_memory"


@dataclass(frozen=True)
class AttentionSite:
    """One attention module, with the sizes read off its live projections.

    Attributes:
        module: the attention module: it holds all that follows.
        core: the module that computes the attention; ``module`` itself, or its child (BERT's ``self``).
        query_source, query_path: the descendant of ``module`` whose output holds the query, and its dotted name.
        normed: whether that is a q-norm rather than the projection.
        tokens_first: whether the q-norm sees tokens in front of heads, whatever lies where.
        blocks: the projection returns this many equal parts, each beginning with the queries of its heads.
        bias: name of a parameter of ``core`` that is added to the query, or empty.
        clip: largest absolute value of the query, or ``None``.
        output_projection, output_path: the descendant of ``module`` that reads the heads' outputs,
            ``[.., heads * value_dim]``, and its dotted name.
        heads, kv_heads: number of query heads and of key/value heads.
        head_dim, value_dim: size of one query and of one head's output.
    """

    module: nn.Module
    core: nn.Module
    query_source: nn.Module
    query_path: str
    normed: bool
    tokens_first: bool
    blocks: int
    bias: str
    clip: float | None
    output_projection: nn.Module
    output_path: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        # every step from ``module`` to the hooked modules: the children of the parent, the name, the child
        steps = (step for path in (self.query_path, self.output_path) for step in _steps(self.module, path))
        object.__setattr__(self, "_links", tuple((parent._modules, name, child) for parent, name, child in steps))

    @property
    def scaling(self) -> float:
        """Factor on q·k in this module's scores."""
        if families.UNSCALED.match(type(self.core).__name__):
            return 1.0
        found = (getattr(self.core, name, None) for name in families.SCALINGS)
        return next((float(factor) for factor in found if isinstance(factor, float | int)), self.head_dim**-0.5)

    @property
    def may_write_into_queries(self) -> bool:
        """Whether the module's forward, or the rotation that it calls, is not transformers' own: Liger's kernels and
        Unsloth's rotate queries where they lie, and PyTorch does not notice."""
        forward = type(self.core).forward
        replaced = "forward" in vars(self.core) and not hasattr(self.core, "_hf_hook")  # accelerate's calls the old one
        if replaced or not _is_of_transformers(forward):
            return True
        inner = inspect.unwrap(forward)
        found = [inner.__globals__[name] for name in _rotations(inner.__code__) if name in inner.__globals__]
        return not all([_is_of_transformers(rotation) for rotation in found])

    def query_from(self, output: Tensor | tuple[Any, ...], source_input: Tensor) -> Tensor:
        """The content query ``[batch.., tokens, heads, head_dim]`` in what ``query_source`` returned."""
        first = output[0] if isinstance(output, tuple) else output
        query = self._behind_norm(first, source_input) if self.normed else self._in_projection(first)
        if self.bias:
            query = query + getattr(self.core, self.bias).view(self.heads, self.head_dim)
        return query if self.clip is None else query.clamp(-self.clip, self.clip)

    def _in_projection(self, output: Tensor) -> Tensor:
        if output.shape[-1] == self.heads * self.head_dim:
            return output.reshape(*output.shape[:-1], self.heads, self.head_dim)
        parts = output.reshape(*output.shape[:-1], self.blocks, -1)
        width = self.heads // self.blocks * self.head_dim
        return parts[..., :width].reshape(*output.shape[:-1], self.heads, self.head_dim)

    def _behind_norm(self, output: Tensor, source_input: Tensor) -> Tensor:
        if output.shape[-1] != self.head_dim or (self.heads == 1 and output.ndim < 4):
            return output.reshape(*output.shape[:-1], self.heads, self.head_dim)
        heads_second_to_last = output.shape[-2] == self.heads
        if output.shape[-3] == self.heads and heads_second_to_last and not self.tokens_first:
            # As many tokens as heads: the norm's input is a view of the projection's rows, so of the two axes
            # the one with the larger stride counts tokens.
            heads_second_to_last = source_input.stride(-3) > source_input.stride(-2)
        return output if heads_second_to_last else output.transpose(-2, -3)

    def take(self, query: Tensor, heads: Tensor) -> tuple[Tensor, Tensor | None]:
        """The queries of the tokens whose heads' outputs are ``heads``, as ``[batch, tokens, heads, head_dim]``, and
        what is left of ``query`` for the next call of the output projection (ProphetNet calls it once a stream).

        Raises:
            PrefixMemoryError: there are fewer queries than outputs, or of other sizes.
        """
        if query.shape[:-2] == heads.shape[:-1] and query.shape[-2:] == (self.heads, self.head_dim):
            return query, None
        batch, tokens = heads.shape[0], heads[0].numel() // (self.heads * self.value_dim)
        rows_first = query.shape[0] == batch or query.ndim == 3 or heads.ndim == 2  # not [tokens, batch] in one of them
        enough = query.numel() >= batch * tokens * self.heads * self.head_dim
        if query.shape[-2:] != (self.heads, self.head_dim) or not rows_first or not enough:
            raise PrefixMemoryError(
                f"The query of {type(self.core).__name__} has shape {list(query.shape)} where its output projection "
                f"reads {list(heads.shape)}, {self.heads} heads a token. Its forward is not one that prefixmemory "
                "knows; exclude it with exclude_modules, or use query='content'."
            )
        query = query.reshape(batch, -1, self.heads, self.head_dim)
        return query[:, :tokens], query[:, tokens:] if query.shape[1] > tokens else None

    def intact(self) -> bool:
        """Whether the hooked modules are still where they were found (nothing wrapped them since)."""
        links: tuple[Any, ...] = self.__dict__["_links"]
        if all([children.get(name) is child for children, name, child in links]):
            return True
        # BigBird makes the core anew, around the same projections, when a text is short; it shows no rotated query
        hooked = ((self.query_path, self.query_source), (self.output_path, self.output_projection))
        return all(descendant(self.module, path) is module for path, module in hooked)

    def attach(self, layer: nn.Module) -> None:
        """Hang a memory layer into the module, where the query tap finds it too."""
        setattr(self.module, CHILD, layer)
        if self.core is not self.module:
            self.core.__dict__[CHILD] = layer  # past nn.Module.__setattr__: it has one parent

    def detach(self) -> None:
        """Take the memory layer out again."""
        delattr(self.module, CHILD)
        self.core.__dict__.pop(CHILD, None)

    def hook(
        self,
        on_start: Callable[..., None],
        on_query: Callable[..., None],
        on_output: Callable[..., tuple[Any, ...] | None],
        on_end: Callable[..., None],
    ) -> tuple[RemovableHandle, ...]:
        """Call ``on_start(module, args)`` before and ``on_end(module, args, output)`` after the attention module, also
        when it raises (``output`` is then ``None``), ``on_query(module, args, output)`` after the query source, and
        ``on_output(module, args)`` before the output projection; the last returns the changed arguments."""
        return (
            self.module.register_forward_pre_hook(on_start),
            self.query_source.register_forward_hook(on_query),
            self.output_projection.register_forward_pre_hook(on_output),
            self.module.register_forward_hook(on_end, always_call=True),
        )


def _is_of_transformers(function: Any) -> bool:
    return isinstance(function, FunctionType) and function.__module__.startswith("transformers.")


@cache
def _rotations(code: CodeType) -> list[str]:
    """What a function calls that may rotate a query, by name."""
    return [name for name in code.co_names if re.search("rotary|rotate|rope", name)]


def descendant(module: nn.Module, path: str) -> nn.Module | None:
    """The descendant with this dotted name, or ``None``."""
    for name in path.split("."):
        child = module._modules.get(name)
        if child is None:
            return None
        module = child
    return module


def _steps(module: nn.Module, path: str) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Parent, name and child along a dotted name."""
    for name in path.split("."):
        child = module._modules[name]
        assert child is not None
        yield module, name, child
        module = child


def placement(projection: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Device on which a projection computes, and its floating-point dtype; ``None`` where it cannot be said.

    Weights that accelerate keeps elsewhere lie on the meta device; its hook knows where they compute.
    """
    weight = next(chain(projection.parameters(), projection.buffers()), None)  # GPTQ and AWQ hold buffers only
    if weight is None:
        return None, None
    device: torch.device | None = weight.device
    if weight.is_meta:
        device = getattr(getattr(projection, "_hf_hook", None), "execution_device", None)
        device = None if device is None else torch.device(device)
    compute_dtype = getattr(projection, "compute_dtype", None) or weight.dtype  # bitsandbytes keeps it aside
    return device, compute_dtype if compute_dtype.is_floating_point else None
