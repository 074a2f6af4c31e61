"""The registry of memories: built-in and custom ones stand in it alike.

A class that turns queries into outputs becomes a context method with one decorator::

    @register_memory("offset")
    class Offset(nn.Module):
        def __init__(self, site):  # a MemorySite: the sizes of the heads
            super().__init__()
            self.b = nn.Parameter(torch.zeros(site.heads, site.value_dim))

        def forward(self, query):  # [batch, tokens, heads, head_dim] -> [batch, tokens, heads, value_dim]
            return self.b.expand(*query.shape[:-1], -1)

``PrefixMemoryConfig(memory="offset")`` makes one in every attention module. Training, saving, switching, the limit,
mixing, several adapters in a batch, gradient checkpointing and unloading are the layer's business, and the same for
every memory. ``docs/guides/build-your-own.md`` walks through an example.

What a class may say of itself, beyond ``forward``:

- fields of the config that it reads: by naming them as keyword arguments of ``__init__``, with their defaults
  (``rank=4``). All other keyword arguments come from the config's ``memory_options``.
- ``mean``: a parameter ``[groups, features]`` that does not require a gradient, beside a method ``features(query)``,
  ``[*b, groups, heads / groups, head_dim]`` to ``[*b, groups, heads / groups, features]``. Before the first step of
  training it is set to the mean of the features over the first batch (``tuner/calibration.py``).
- ``queries``: a tuple of ``"content"`` and ``"rotary"``, if ``forward`` wants other queries than the config's one.
- ``inside = True``: it stands inside the softmax, has ``vectors()`` (keys and values) and is not called. It must read
  the field ``placement``, which is then ``"inside"``.
- ``matrix()``: ``[groups, features, value_dim]``, by which the readout shows the tokens that it speaks for.
- ``uses_softmax = True``: its output comes from a softmax, so that it has no such matrix.
- ``is_linear = True``: its output is linear in its parameters; then ``set_to_sum(memories, weights)`` makes it their
  weighted sum, and ``add_weighted_adapter`` takes it.
- ``is_divisible = True``: it has ``groups`` memories and one row of every parameter for each, and ``forward`` goes by
  the sizes of its parameters, so that tensor-parallel processes can divide it.
- ``output_limit``: the default of the config's field of that name.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Concatenate, Final, TypeVar, cast

import torch
from torch import Tensor, nn

from prefixmemory._shapes import Float
from prefixmemory.errors import PrefixMemoryError, did_you_mean

#: A field of the config whose value follows from the others.
AUTO: Final = "auto"

#: The fields of the config that a memory may read: what stands in the config of a memory that does not.
MEMORY_FIELDS: dict[str, object] = {
    "feature_map": None,
    "feature_dim": None,
    "normalize": "none",
    "rank": None,
    "share_heads": False,
    "dropout": 0.0,
    "prefix_length": None,
    "placement": "outside",
    "similarity": None,
    "normalizer": False,
    "reparameterize": None,
}


@dataclass(frozen=True)
class MemorySite:
    """Where a memory stands: what its class is given.

    Attributes:
        heads: number of query heads.
        kv_heads: number of key/value heads; query head n belongs to group ``n // (heads // kv_heads)``.
        head_dim: size of a query.
        value_dim: size of a head's output.
        scaling: factor on q·k in the scores of this attention.
        first: to share parameters between layers: the module that this adapter has in its first layer, as a tuple of
            one, so that an attribute which keeps it does not make it a child; empty in the first layer itself. What
            lies there is saved once. It stays on the first layer's device.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scaling: float = 1.0
    first: tuple[nn.Module, ...] = ()


MemoryFactory = Callable[Concatenate[MemorySite, ...], nn.Module]
_FactoryT = TypeVar("_FactoryT", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class MemoryKind:
    """One entry of the registry.

    Attributes:
        name: under which it is registered.
        factory: its class, or a function that makes its modules.
        lacks: fields of the config that it does not read, with the reason, where there is a better one than the usual.
        instead: what a config needs in order to have such a field.
    """

    name: str
    factory: MemoryFactory
    lacks: Mapping[str, str]
    instead: str

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the config that it reads, with their defaults (``inspect.Parameter.empty``: none)."""
        parameters = inspect.signature(self.factory).parameters
        return {name: parameters[name].default for name in MEMORY_FIELDS if name in parameters}

    def says(self, name: str, default: Any = None) -> Any:
        """What the class says of itself under ``name``."""
        return getattr(self.factory, name, default)

    def settle(self, config: Any) -> None:
        """Give the fields of the config that are left open their values.

        Raises:
            PrefixMemoryError: a field was given that means nothing to this memory, or one is missing.
        """
        fields = self.fields
        for name, neutral in MEMORY_FIELDS.items():
            value = getattr(config, name)
            if name not in fields:
                if value not in (AUTO, neutral):
                    why = self.lacks.get(
                        name,
                        f"a registered memory has a field only if its class names {name}= as an "
                        "argument; what else it needs goes into memory_options",
                    )
                    raise PrefixMemoryError(f"{name}={value!r} needs {self.instead}: {why}.")
                setattr(config, name, neutral)
            elif value == AUTO:
                if fields[name] is inspect.Parameter.empty:
                    raise PrefixMemoryError(f"memory={self.name!r} needs {name}: give a value.")
                setattr(config, name, fields[name])

    def check_options(self, options: object) -> None:
        """Refuse options that its class does not take or that no file can hold.

        Raises:
            PrefixMemoryError: says which.
        """
        options = {} if options is None else options
        if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
            raise PrefixMemoryError(f"memory_options={options!r} is no set of names and values: give a dict.")
        for key, value in options.items():
            if key in MEMORY_FIELDS:
                raise PrefixMemoryError(f"memory_options has {key!r}, a field of the config: give {key}={value!r}.")
            is_number = not isinstance(value, float) or math.isfinite(value)
            if not (isinstance(value, bool | int | float | str) and is_number):
                raise PrefixMemoryError(
                    f"memory_options[{key!r}]={value!r} is no number, text or truth value: give one."
                )
        try:
            inspect.signature(self.factory).bind(None, **self.fields, **options)
        except TypeError as error:
            raise PrefixMemoryError(f"memory_options={options!r} do not suit memory={self.name!r}: {error}.") from error

    def build(self, config: Any, site: MemorySite) -> nn.Module:
        """A memory for ``site``, with the config's fields and options.

        Raises:
            PrefixMemoryError: its class returned no module, or refused a value.
        """
        values = {name: getattr(config, name) for name in self.fields}
        module = self.factory(site, **values, **(config.memory_options or {}))
        if not isinstance(module, nn.Module):
            raise PrefixMemoryError(f"memory={self.name!r} made a {type(module).__name__}: return an nn.Module.")
        return module


MEMORIES: dict[str, MemoryKind] = {}


def register_memory(
    name: str, *, lacks: Mapping[str, str] | None = None, instead: str | None = None
) -> Callable[[_FactoryT], _FactoryT]:
    """Decorator: make an ``nn.Module`` class, or a function that returns one, available as ``memory=name``.

    It is called with a :class:`MemorySite`, once for each attention module, and with fields of the config and its
    ``memory_options`` as keyword arguments (see above). The module's ``forward`` is given queries ``[batch, tokens,
    heads, head_dim]`` in the dtype of its parameters and returns outputs ``[batch, tokens, heads, value_dim]``, zero at
    the start. Its parameters are trained, except those that do not require a gradient; a buffer must be persistent if
    ``low_cpu_mem_usage=True`` is to load it.

    Saved adapters hold the name, not the code: import the module that registers it before loading one.

    Args:
        name: the name.
        lacks: fields of the config that it does not read, with the reason.
        instead: what a config needs in order to have such a field; ``None``: the built-in memory.

    Raises:
        PrefixMemoryError: when the name is taken; names are never overwritten silently.
    """

    def register(factory: _FactoryT) -> _FactoryT:
        if name in MEMORIES or name == AUTO:
            raise PrefixMemoryError(f"memory={name!r} is registered already. Choose another name.")
        MEMORIES[name] = MemoryKind(name, factory, lacks or {}, instead or f"memory='matrix', not {name!r}")
        return factory

    return register


def memory_kind(name: object) -> MemoryKind:
    """The entry called ``name``.

    Raises:
        PrefixMemoryError: there is none.
    """
    if not isinstance(name, str) or name not in MEMORIES:
        raise PrefixMemoryError(
            f"memory={name!r} is not registered.{did_you_mean(str(name), MEMORIES)} Import the module that registers "
            f"it before loading. Registered: {', '.join(MEMORIES)}."
        )
    return MEMORIES[name]


def ask(kind: str, memory: nn.Module, site: MemorySite, *queries: Float[Tensor, "*b h d"]) -> Float[Tensor, "*b h v"]:
    """The output of a custom memory, asked in the dtype of its parameters.

    Raises:
        PrefixMemoryError: the output has the wrong shape.
    """
    like = next((p for module in (memory, *site.first) for p in module.parameters()), queries[0])
    answer = memory(*(query.to(like.dtype) for query in queries))
    shape = (*queries[0].shape[:-1], site.value_dim)
    if not isinstance(answer, Tensor) or answer.shape != shape:
        found = list(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise PrefixMemoryError(
            f"memory={kind!r} answered queries {list(queries[0].shape)} with {found}: return a tensor {list(shape)}."
        )
    return answer


@torch.no_grad()
def check_start(kind: MemoryKind, memory: nn.Module, site: MemorySite, others: Iterable[nn.Parameter]) -> None:
    """Refuse what would not be saved rightly or would change the base model, before the memory is attached.

    The output for a few random queries, from a generator of their own, must be zero.

    Args:
        kind: of the memory.
        memory: new.
        site: where it will stand.
        others: the parameters of the memories that are attached already.

    Raises:
        PrefixMemoryError: a parameter is among ``others``, or the outputs have the wrong shape or are not zero.
    """
    taken = {id(parameter) for parameter in others}
    for name, parameter in memory.named_parameters():
        if id(parameter) in taken:
            raise PrefixMemoryError(
                f"memory={kind.name!r} made a module whose {name!r} belongs to another memory, so that it would be "
                "saved twice. Make new parameters in every call; what layers share, read from site.first."
            )
    if is_inside(memory):
        return
    shared = [parameter for module in site.first for parameter in module.parameters()]
    if shared:  # it may be placed already, as this memory will be
        memory.to(device=shared[0].device, dtype=shared[0].dtype)
    parameters = [*memory.parameters(), *shared]
    if any(parameter.is_meta or not parameter.numel() for parameter in parameters):
        return  # no values yet: a checkpoint brings them
    # more tokens than heads: a transposed output has another shape
    shape = (2, site.heads + 1, site.heads, site.head_dim)
    query = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
    query = query.to(parameters[0].device) if parameters else query
    training = memory.training
    memory.eval()
    if getattr(memory, "mean", None) is not None:
        _check_mean(kind.name, memory, site, query)
    answer = ask(kind.name, memory, site, *[query] * len(queries_of(memory, "content")))
    memory.train(training)
    if not torch.all(answer == 0):
        raise PrefixMemoryError(
            f"memory={kind.name!r} does not start at zero, so a new adapter would change the base model. Let one "
            "factor of its output start at zero."
        )


def _check_mean(kind: str, memory: nn.Module, site: MemorySite, query: Float[Tensor, "*b h d"]) -> None:
    """Refuse a mean that could not be set before the first step of training."""
    mean, features = memory.mean, getattr(memory, "features", None)
    if not (isinstance(mean, nn.Parameter) and mean.ndim == 2 and site.heads % len(mean) == 0 and callable(features)):
        raise PrefixMemoryError(
            f"memory={kind!r} has a mean that cannot be taken: make it nn.Parameter(torch.zeros(groups, features), "
            "requires_grad=False), beside a method features(query); what is no mean of features needs another name."
        )
    queries = [query.to(mean.dtype).unflatten(-2, (len(mean), -1))] * len(queries_of(memory, "content"))
    found, wanted = features(*queries).shape, (*queries[0].shape[:-1], mean.shape[1])
    if found != wanted:
        raise PrefixMemoryError(
            f"features() of memory={kind!r} turned queries {list(queries[0].shape)} into {list(found)}: return "
            f"{list(wanted)}, as its mean {list(mean.shape)} says."
        )


def lacks_mean(memory: nn.Module) -> bool:
    """Whether a memory subtracts a mean that is still zero."""
    mean = getattr(memory, "mean", None)
    return isinstance(mean, Tensor) and not mean.is_meta and not bool(whole(mean).any())


def whole(tensor: Tensor) -> Tensor:
    """A tensor, also one that is spread over processes."""
    return cast(Tensor, cast(Any, tensor).full_tensor()) if hasattr(tensor, "full_tensor") else tensor


def queries_of(memory: nn.Module, query: str) -> tuple[str, ...]:
    """The queries that a memory wants; ``query`` where it does not say."""
    return tuple(getattr(memory, "queries", (query,)))


def is_inside(memory: nn.Module) -> bool:
    """Whether a memory stands inside the softmax."""
    return bool(getattr(memory, "inside", False))


def matrix_of(kind: str, memory: nn.Module, site: MemorySite) -> Float[Tensor, "g f v"]:
    """What a memory's ``matrix()`` returns, for the readout.

    Raises:
        PrefixMemoryError: it has none, or it has another shape.
    """
    if not hasattr(memory, "matrix"):
        raise PrefixMemoryError(
            f"memory={kind!r} has no matrix(), so it cannot be read out as tokens. Give its class a method "
            "that returns [heads, features, value_dim], or look at its trade-off and spectrum."
        )
    matrix = cast(Tensor, cast(Any, memory).matrix())
    if matrix.ndim != 3 or site.heads % (matrix.shape[0] or site.heads + 1) or matrix.shape[2] != site.value_dim:
        raise PrefixMemoryError(
            f"matrix() of memory={kind!r} has shape {list(matrix.shape)}: return "
            f"[{site.heads}, features, {site.value_dim}]."
        )
    return matrix
