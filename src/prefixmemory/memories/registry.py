"""Memories of the reader's own: their registry, and what the layer asks of a memory.

A class that answers queries becomes a context method with one decorator::

    @register_memory("offset")
    class Offset(nn.Module):
        def __init__(self, site):  # a MemorySite: the sizes of the heads
            super().__init__()
            self.b = nn.Parameter(torch.zeros(site.heads, site.value_dim))

        def forward(self, query):  # [batch, tokens, heads, head_dim] -> [batch, tokens, heads, value_dim]
            return self.b.expand(*query.shape[:-1], -1)

``PrefixMemoryConfig(memory="offset")`` makes one in every attention module. Training, saving, switching, several
adapters in a batch, gradient checkpointing and unloading are the layer's business, and the same as for every memory.
``docs/guides/build-your-own.md`` walks through an example.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Concatenate, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn

from prefixmemory._shapes import Float
from prefixmemory.errors import PrefixMemoryError, did_you_mean
from prefixmemory.memories.combination import AnswerLimit, Mixing


@runtime_checkable
class ContextMemory(Protocol):
    """What the layer asks of every memory, the package's and the reader's.

    It is an ``nn.Module`` that answers queries ``[batch, tokens, heads, head_dim]`` with ``[batch, tokens, heads,
    value_dim]``, token by token and row by row. Free and registered memories start with answers of zero, so that a new
    adapter leaves the base model as it is, unless its answer is mixed in. The layer multiplies the answer by the
    adapter's scale and adds it to the heads' outputs.
    """

    @property
    def query(self) -> str:
        """Which query it wants: ``content`` (before rotation) or ``rotary``."""
        ...

    @property
    def inside(self) -> bool:
        """Whether it stands inside the softmax; then it has ``vectors()`` (keys and values) and is not called."""
        ...

    @property
    def mixing(self) -> Mixing | AnswerLimit | None:
        """How its answer joins the heads' outputs; ``None``: added as it is."""
        ...

    def __call__(self, query: Tensor) -> Tensor:
        """The answer to each query."""
        ...


@dataclass(frozen=True)
class MemorySite:
    """Where a registered memory stands: what its class is given.

    Attributes:
        heads: number of query heads.
        kv_heads: number of key/value heads; query head n belongs to group ``n // (heads // kv_heads)``.
        head_dim: size of a query.
        value_dim: size of a head's output.
        first: to share parameters between layers: the module that this adapter has in its first layer, as a tuple of
            one, so that an attribute which keeps it does not make it a child; empty in the first layer itself. What
            lies there is saved once. It stays on the first layer's device.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    first: tuple[nn.Module, ...] = ()


MemoryFactory = Callable[Concatenate[MemorySite, ...], nn.Module]
_FactoryT = TypeVar("_FactoryT", bound=Callable[..., nn.Module])

MEMORIES: dict[str, MemoryFactory] = {}


def register_memory(name: str) -> Callable[[_FactoryT], _FactoryT]:
    """Decorator: make an ``nn.Module`` class, or a function that returns one, available as ``memory=name``.

    It is called with a :class:`MemorySite`, once for each attention module, and with the config's ``memory_options``
    as keyword arguments. The module's ``forward`` is given queries ``[batch, tokens, heads, head_dim]`` in the dtype of
    its parameters and returns answers ``[batch, tokens, heads, value_dim]``, zero at the start. All its parameters are
    trained; what shall stay fixed is a buffer, persistent if ``low_cpu_mem_usage=True`` is to load it. A method
    ``matrix()`` that returns ``[heads, features, value_dim]`` lets the read-out show the tokens that it speaks for.

    Saved adapters hold the name, not the code: import the module that registers it before loading one.

    Raises:
        PrefixMemoryError: when the name is taken; names are never overwritten silently.
    """

    def register(factory: _FactoryT) -> _FactoryT:
        if name in MEMORIES:
            raise PrefixMemoryError(f"memory={name!r} is registered already. Choose another name.")
        MEMORIES[name] = factory
        return factory

    return register


def check_memory(name: object, options: object) -> None:
    """Refuse a memory that is not registered, and options that it does not take or that no file can hold.

    Raises:
        PrefixMemoryError: says which.
    """
    if not isinstance(name, str) or name not in MEMORIES:
        raise PrefixMemoryError(
            f"memory={name!r} is not registered.{did_you_mean(str(name), MEMORIES)} Import the module that registers "
            f"it before loading. Registered: {', '.join(MEMORIES) or 'none'}."
        )
    if options is None:
        options = {}
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise PrefixMemoryError(f"memory_options={options!r} is no set of names and values: give a dict.")
    for key, value in options.items():
        if not isinstance(value, bool | int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
            raise PrefixMemoryError(f"memory_options[{key!r}]={value!r} is no number, text or truth value: give one.")
    try:
        inspect.signature(MEMORIES[name]).bind(None, **options)
    except TypeError as error:
        raise PrefixMemoryError(f"memory_options={options!r} do not suit memory={name!r}: {error}.") from error


class OwnMemory(nn.Module):
    """A registered memory as the layer sees it; ``module`` is what its class made.

    Args:
        name: under which it is registered.
        options: keyword arguments for its class.
        site: where it stands.
        query: ``content`` or ``rotary``.
        mixing: see :class:`~prefixmemory.memories.combination.Mixing`.

    Raises:
        PrefixMemoryError: its class returned no module.
    """

    def __init__(
        self, name: str, options: Mapping[str, Any], site: MemorySite, query: str, mixing: Mixing | AnswerLimit | None
    ) -> None:
        super().__init__()
        self.name, self.site, self.query, self.mixing = name, site, query, mixing
        self.inside = False
        module = MEMORIES[name](site, **options)
        if not isinstance(module, nn.Module):
            raise PrefixMemoryError(f"memory={name!r} made a {type(module).__name__}: return an nn.Module.")
        self.module = module

    def forward(self, query: Float[Tensor, "*batch h d"]) -> Float[Tensor, "*batch h v"]:
        """The module's answer, asked in the dtype of its parameters."""
        like = next((p for module in (self.module, *self.site.first) for p in module.parameters()), query)
        answer = self.module(query.to(like.dtype))
        shape = (*query.shape[:-1], self.site.value_dim)
        if not isinstance(answer, Tensor) or answer.shape != shape:
            found = list(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            asked = f"memory={self.name!r} answered queries {list(query.shape)} with {found}"
            raise PrefixMemoryError(f"{asked}: return a tensor {list(shape)}.")
        return answer

    @torch.no_grad()
    def check(self, others: Iterable[nn.Parameter]) -> None:
        """Refuse what would not be saved rightly or would change the base model, before the memory is attached.

        A few random queries, from a generator of their own, must be answered by zero.

        Args:
            others: the parameters of the memories that are attached already.

        Raises:
            PrefixMemoryError: a parameter is among ``others``, or the answers have the wrong shape or are not zero.
        """
        taken = {id(parameter) for parameter in others}
        for name, parameter in self.module.named_parameters():
            if id(parameter) in taken:
                raise PrefixMemoryError(
                    f"memory={self.name!r} made a module whose {name!r} belongs to another memory, so that it would be "
                    "saved twice. Make new parameters in every call; what layers share, read from site.first."
                )
        shared = [parameter for module in self.site.first for parameter in module.parameters()]
        if shared:  # it may be placed already, as this memory will be
            self.to(device=shared[0].device, dtype=shared[0].dtype)
        parameters = [*self.module.parameters(), *shared]
        if any(parameter.is_meta for parameter in parameters):
            return  # no values yet: a checkpoint brings them
        # more tokens than heads: a transposed answer has another shape
        shape = (2, self.site.heads + 1, self.site.heads, self.site.head_dim)
        query = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
        training = self.module.training
        self.module.eval()
        answer = self(query.to(parameters[0].device) if parameters else query)
        self.module.train(training)
        if not torch.all(answer == 0):
            raise PrefixMemoryError(
                f"memory={self.name!r} does not start at zero, so a new adapter would change the base model. Let one "
                "factor of its answer start at zero."
            )

    def matrix(self) -> Float[Tensor, "g f v"]:
        """What the module's ``matrix()`` returns, for the read-out.

        Raises:
            PrefixMemoryError: it has none, or it has another shape.
        """
        if not hasattr(self.module, "matrix"):
            raise PrefixMemoryError(
                f"memory={self.name!r} has no matrix(), so it cannot be read out as tokens. Give its class a method "
                "that returns [heads, features, value_dim], or look at its trade-off and spectrum."
            )
        matrix: Tensor = cast(Any, self.module).matrix()
        heads, size = self.site.heads, self.site.value_dim
        if matrix.ndim != 3 or heads % (matrix.shape[0] or heads + 1) or matrix.shape[2] != size:
            raise PrefixMemoryError(
                f"matrix() of memory={self.name!r} has shape {list(matrix.shape)}: return [{heads}, features, {size}]."
            )
        return matrix
