"""Which modules a config names, and what was found out for it; names that an adapter may have."""

from __future__ import annotations

from copy import copy
from typing import Any

from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from prefixmemory.attention.discovery import find_site
from prefixmemory.attention.feed_forward import FeedForwardSite
from prefixmemory.attention.sites import AttentionSite
from prefixmemory.errors import PrefixMemoryError, did_you_mean
from prefixmemory.memories.config import PrefixMemoryConfig
from prefixmemory.tuner.layer import PrefixMemoryLayer

#: PEFT lists all of these as modules to save, of which a model has one.
HEADS = {"classifier", "score", "qa_outputs"}


#: With what the parts of paths begin that PEFT's methods add, and those of our own tensors.
_OF_ADAPTERS = ("prefix_memory", "lora_", "modules_to_save", "original_module", "trainable_tokens", "token_adapter")
_PARTS = {"prefix_memory", "prefix_memory_bank", "prefix_memory_mixing", "A", "B", "M", "mean"}
#: In a config that was given to a model: what was found out for it, which is not the user's word to the next one.
_FOUND = "_found_for_a_model"


def note_found(config: PrefixMemoryConfig, **given: Any) -> None:
    """Remember which of these fields the user left open (``None``), and with what they were filled in."""
    config.__dict__[_FOUND] = {name: getattr(config, name) for name, value in given.items() if value is None}


def forget_found(config: PrefixMemoryConfig) -> None:
    """Leave open again what was filled in for an earlier model, unless it was changed since."""
    for name, value in config.__dict__.pop(_FOUND, {}).items():
        if getattr(config, name) == value:
            setattr(config, name, None)


def check_adapter_name(name: str, model: nn.Module) -> None:
    """Refuse a name that PEFT takes for a part of a path: it leaves tensors of other adapters out of their files.

    Raises:
        PrefixMemoryError: it is one.
    """
    paths = (path.split(".") for path, _ in model.named_modules())
    own = {part for path in paths if not any(part.startswith(_OF_ADAPTERS) for part in path) for part in path}
    if name in own | _PARTS:
        raise PrefixMemoryError(
            f"An adapter cannot be called {name!r}: modules of the model are, and PEFT would leave tensors out of the "
            "files of other adapters. Give it another name."
        )


class NoAttentionMatchedError(PrefixMemoryError, NoMatchingPeftModuleError):
    """The config names no module of the model; also what PEFT raises where nothing matches."""


def check_targets(
    config: PrefixMemoryConfig,
    sites: dict[str, AttentionSite],
    feed_forward: dict[str, FeedForwardSite],
    model: nn.Module,
) -> None:
    """Refuse targets that match no module, or one that is neither a softmax attention nor, where the config asks for
    memories there, a feed-forward projection; and patterns that fit no target.

    Raises:
        PrefixMemoryError: names what matched, and the attention modules that there are.
    """
    matched = [
        name
        for name, module in model.named_modules()
        if name
        and not isinstance(matched := is_target(config, name), _ExcludedModule)
        and matched
        and not isinstance(module, PrefixMemoryLayer)
    ]
    available = sorted({name.rpartition(".")[2] for name in (*sites, *feed_forward)})
    for name in matched:
        # cross attention is no site by default, and may be asked for by name
        if name not in sites and name not in feed_forward and find_site(model.get_submodule(name)) is None:
            kind = "attention" if config.feed_forward is None else "attention or feed-forward"
            raise PrefixMemoryError(
                f"target_modules={_shown(config.target_modules)} matches {name!r}, which is no softmax attention. "
                f"Name {kind} modules, here {available}, or leave target_modules out for all of them."
            )
    narrowed = "".join(
        f", {field}={_shown(value)}"
        for field in ("layers_to_transform", "layers_pattern", "exclude_modules")
        if (value := getattr(config, field)) is not None
    )
    in_blocks = feed_forward.keys() & set(matched)
    if len(in_blocks) == len(matched):  # no attention, or nothing
        wanted = config.target_modules if isinstance(config.target_modules, str) else min(config.target_modules or [""])
        raise NoAttentionMatchedError(
            f"target_modules={_shown(config.target_modules)}{narrowed} matches no attention "
            f"module of {type(model).__name__}.{did_you_mean(wanted, available)} Its {len(sites)} attention modules "
            f"are called {sorted({name.rpartition('.')[2] for name in sites})}, from {next(iter(sites))!r} on; leave "
            "target_modules out for all of them."
        )
    _check_all_meet(config, [*sites, *feed_forward, *matched], model)
    if config.feed_forward is not None:
        _check_blocks(config, feed_forward, in_blocks, narrowed, type(model).__name__)
    if (unused := config.unused_pattern(matched)) is not None:
        raise PrefixMemoryError(
            f"{unused} fits no module that gets a memory; the first is called {matched[0]!r}. Give the end "
            "of such a name, or a regular expression for it."
        )


def _check_all_meet(config: PrefixMemoryConfig, possible: list[str], model: nn.Module) -> None:
    """Refuse names and numbers that meet nothing: a typo would leave a module out, or in. ``possible`` are the names of
    modules that a memory may have."""
    every = dict.fromkeys(name for name, module in model.named_modules() if not isinstance(module, PrefixMemoryLayer))
    saved = set(config.modules_to_save or ()) - HEADS
    for field, names, before in (  # PEFT takes "head" for lm_head among modules to save
        ("target_modules", config.target_modules, "."),
        ("exclude_modules", config.exclude_modules, "."),
        ("modules_to_save", saved, ""),
    ):
        for wanted in sorted(names) if isinstance(names, set | list | tuple) else ():
            if wanted not in every and not any(name.endswith(f"{before}{wanted}") for name in every):
                hint = did_you_mean(wanted, {name.rpartition(".")[2] for name in every})
                raise PrefixMemoryError(f"{field} names {wanted!r}, which meets nothing here.{hint} Leave it out.")
    if config.layers_to_transform is not None:
        asked = config.layers_to_transform
        numbers = {int(part) for name in possible for part in name.split(".") if part.isdecimal()}
        for number in [asked] if isinstance(asked, int) else asked:
            if number not in numbers:
                raise PrefixMemoryError(
                    f"layers_to_transform names layer {number}, which has no target here; there are "
                    f"{', '.join(map(str, sorted(numbers)))}."
                )


def _check_blocks(
    config: PrefixMemoryConfig, known: dict[str, FeedForwardSite], matched: set[str], narrowed: str, model: str
) -> None:
    """Refuse a config that asks for memories in feed-forward blocks, and names none, or has them saved in full."""
    if not known:
        raise PrefixMemoryError(
            f"feed_forward={config.feed_forward} finds no feed-forward projection in {model} that prefixmemory knows. "
            "Leave it out; a recipe without a method has it by itself: give it `method: {active_from: auto}`."
        )
    saved = set(config.modules_to_save or ())
    if both := [name for name in known if saved.intersection(name.split("."))]:
        raise PrefixMemoryError(
            f"modules_to_save={sorted(saved)} trains {both[0]!r} in full, where feed_forward={config.feed_forward} "
            "puts a memory. Leave one of them out."
        )
    if not matched:
        ends = sorted({name.rpartition(".")[2] for name in known})
        raise PrefixMemoryError(
            f"feed_forward={config.feed_forward} meets no feed-forward projection of {model}: target_modules="
            f"{_shown(config.target_modules)}{narrowed} leaves none. Name some of {ends} there too, or leave it out."
        )


def is_target(config: PrefixMemoryConfig, key: str) -> Any:
    """As in PEFT, but that ``layers_to_transform`` counts for targets given by their whole names too."""
    if config.layers_to_transform is not None and key in (config.target_modules or ()):
        config = copy(config)
        config.target_modules = {key.rpartition(".")[2]}
    return check_target_module_exists(config, key)


def _shown(value: object) -> str:
    return repr(sorted(value) if isinstance(value, set) else value)


def shortest_names(names: list[str], model: nn.Module) -> set[str]:
    """The last parts of the names where these mean the same modules, else the whole names."""
    short = {name.rpartition(".")[2] for name in names}
    others = [name for name, _ in model.named_modules() if name not in names]
    return short if not any(other.rpartition(".")[2] in short for other in others) else set(names)
