"""Finding the attention of a model: the tables of ``families.py`` matched against live modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from prefixmemory.attention import families
from prefixmemory.attention.families import QueryNorm, QueryProjection
from prefixmemory.attention.sites import AttentionSite, descendant
from prefixmemory.errors import PrefixMemoryError


def _widths(projection: nn.Module) -> tuple[int, int] | None:
    """What a projection reads and returns, in features; ``None`` if it is no projection."""
    projection = projection._modules.get("linear") or projection  # Moshi, Gemma 4
    for reads, returns in (("in_features", "out_features"), ("nx", "nf"), ("input_size", "output_size")):
        widths = getattr(projection, reads, None), getattr(projection, returns, None)
        if isinstance(widths[0], int) and isinstance(widths[1], int):
            return widths[0] * getattr(projection, "n_groups", 1), widths[1]  # DeepSeek V4 reads in groups
    weight = projection._parameters.get("weight")
    return None if weight is None or weight.ndim < 2 else (weight.shape[-1], weight.shape[-2])


def _number(holder: object, attributes: Iterable[str]) -> int | None:
    """The first of ``attributes`` that ``holder`` has as a positive number."""
    values = (getattr(holder, attribute, None) for attribute in attributes)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _declared(module: nn.Module, attributes: Iterable[str]) -> int | None:
    return _number(module, attributes) or _number(getattr(module, "config", None), attributes)


def _width_of(module: nn.Module, names: Iterable[str]) -> int | None:
    """What the first child with one of these names returns, in features."""
    children = (module._modules.get(name) for name in names)
    return next((widths[1] for child in children if child is not None and (widths := _widths(child))), None)


def _output_path(module: nn.Module, row: QueryProjection | None) -> str | None:
    paths = (row.output,) if row is not None and row.output else families.OUTPUT_PROJECTIONS
    return next((p for p in paths if (child := descendant(module, p)) is not None and _widths(child)), None)


def _projection(module: nn.Module) -> QueryProjection | None:
    kind = type(module).__name__
    rows = (row for row in families.QUERY_PROJECTIONS if re.match(row.classes, kind))
    return next((row for row in rows if (child := descendant(module, row.path)) is not None and _widths(child)), None)


def _norm(module: nn.Module) -> QueryNorm | None:
    kind = type(module).__name__
    for norm in families.QUERY_NORMS:
        if norm.child in module._modules and re.match(norm.classes, kind) and not re.match(norm.but, kind):
            return norm if module._modules[norm.child] is not None else None
    return None


def find_site(module: nn.Module) -> AttentionSite | None:
    """Describe ``module`` as an attention site, or ``None`` if it is no softmax attention that we know."""
    site = _inspect(module)
    return site if isinstance(site, AttentionSite) else None


def _inspect(module: nn.Module) -> AttentionSite | str:
    """The site, or why there is none."""
    kind = type(module).__name__
    if not families.ATTENTION.search(kind):
        return f"{kind} is no attention"
    if families.NOT_SOFTMAX.search(kind):
        return f"{kind} is attention without a softmax"
    core, row, prefix = module, _projection(module), ""
    if row is None:
        for name in families.CORES:
            inner = module._modules.get(name)
            if inner is not None and families.ATTENTION.search(type(inner).__name__) and not _output_path(inner, None):
                core, row, prefix = inner, _projection(inner), f"{name}."
                break
    for sign, reason in families.REFUSED.items():
        if hasattr(core, sign) or re.match(sign, kind) or re.match(sign, type(core).__name__):
            return f"{kind} cannot be read: {reason}"
    if row is None:
        if any(row.path in core._parameters for row in families.QUERY_PROJECTIONS):
            return f"{kind} cannot be read: its projections are parameters, so that no projection is called"
        return f"{kind} has no query projection that is known among {', '.join(module._modules) or 'its children'}"
    output_path = _output_path(module, row)
    if output_path is None:
        return f"{kind} has no output projection that is known among {', '.join(module._modules)}"
    return _measure(module, core, row, prefix, output_path)


def _measure(
    module: nn.Module, core: nn.Module, row: QueryProjection, prefix: str, output_path: str
) -> AttentionSite | str:
    """Read the sizes, and refuse a module whose widths do not agree with them.

    A family that lays its query out otherwise is not known, rather than read wrongly.
    """
    kind = type(module).__name__
    projection, output_projection = core.get_submodule(row.path), module.get_submodule(output_path)
    norm = _norm(core)
    width, reads = _widths(projection)[1], _widths(output_projection)[0]  # type: ignore[index]  # both were measured
    head_dim, heads = _number(core, families.HEAD_DIMS), _number(core, (row.heads,) if row.heads else families.HEADS)
    key_width, value_width = _width_of(core, families.KEYS), _width_of(core, families.VALUES)
    if head_dim is None:
        heads = heads or _declared(core, families.HEADS)
        head_dim = _declared(core, families.HEAD_DIMS) or (reads // heads if heads else None)
    if head_dim is None:
        return f"{kind} does not say how many heads it has"
    kv_heads = key_width // head_dim if key_width else None
    value_dim = _number(core, families.VALUE_DIMS) or (
        value_width // kv_heads if value_width and kv_heads else head_dim
    )
    heads = heads or reads // value_dim  # the config may say otherwise: layers differ
    if not kv_heads:
        groups = _number(core, ("num_key_value_groups",))
        kv_heads = heads // groups if groups else _declared(core, families.KV_HEADS) or heads
    beside = {"nothing": 0, "gate": heads * value_dim, "keys and values": kv_heads * (head_dim + value_dim)}
    widths = {heads * head_dim + beside[row.beside]}
    if norm is not None and row.beside == "nothing":
        widths.add(2 * heads * head_dim)  # a gate beside the query, which the norm does not see
    blocks = {"heads": heads, "kv_heads": kv_heads}.get(str(row.blocks), row.blocks)
    if width not in widths or reads != heads * value_dim or not kv_heads or heads % kv_heads:
        return (
            f"{kind} is laid out otherwise than is known: its query projection returns {width} features and its "
            f"output projection reads {reads}, for {heads} heads of {head_dim}"
        )
    if not isinstance(blocks, int) or heads % blocks or width % blocks:
        return f"{kind} is laid out otherwise than is known: {heads} heads in {blocks} blocks"
    return AttentionSite(
        module=module,
        core=core,
        query_source=projection if norm is None else core.get_submodule(norm.child),
        query_path=prefix + (row.path if norm is None else norm.child),
        normed=norm is not None,
        tokens_first=norm is not None and norm.tokens_first,
        blocks=blocks,
        bias=row.bias,
        clip=getattr(core, "clip_qkv", None) or getattr(getattr(core, "config", None), "clip_qkv", None),
        output_projection=output_projection,
        output_path=output_path,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
    )


def is_cross_attention(name: str, module: nn.Module) -> bool:
    """Whether an attention module reads keys from another sequence."""
    return (
        any(part in families.CROSS_ATTENTION_NAMES for part in name.split("."))
        or "CrossAttention" in type(module).__name__
        or bool(getattr(module, "is_cross_attention", False))
    )


def find_sites(model: nn.Module) -> dict[str, AttentionSite]:
    """Every softmax self-attention of a model, by module name, in the order of the model.

    Raises:
        PrefixMemoryError: the model has none.
    """
    sites = {
        name: site
        for name, module in model.named_modules()
        if not is_cross_attention(name, module) and (site := find_site(module)) is not None
    }
    if not sites:
        reasons = [_inspect(m) for _, m in model.named_modules() if families.ATTENTION.search(type(m).__name__)]
        why = f" ({reasons[0] if reasons else 'no class is called ...Attention'})"
        raise PrefixMemoryError(
            f"{type(model).__name__} has no softmax self-attention that prefixmemory knows{why}, so there is nowhere "
            "to put a memory. Use a transformer with softmax attention, or add its family to the tables in "
            "prefixmemory/attention/families.py (CONTRIBUTING.md says how)."
        )
    return sites


def left_out(model: nn.Module, sites: Iterable[str]) -> dict[str, str]:
    """The sites that get no memory unless they are named, with the reason: those that no gradient reaches, and in a
    model with a text part and others (vision, audio), those outside of the text part. To that belong the parts
    whose config is of the class of the model's text config."""
    config: Any = getattr(model, "config", None)
    try:
        text = config.get_text_config()
    except (AttributeError, ValueError):  # no transformers config, or several text parts
        text = None
    composite = text is not None and (
        text is not config or any(hasattr(config, part) for part in families.CONFIGS_OF_OTHER_PARTS)
    )
    in_text = {"": True}
    reasons = {"": ""}
    for name, module in model.named_modules():
        if name:
            reasons[name] = families.NO_GRADIENT.get(type(module).__name__) or reasons[name.rpartition(".")[0]]
            in_text[name] = in_text[name.rpartition(".")[0]]
        own = getattr(module, "config", None)
        if composite and isinstance(module, PreTrainedModel):
            in_text[name] = isinstance(own, type(text))
        elif composite and isinstance(own, PreTrainedConfig):  # or the config of the whole, wherever it stands
            in_text[name] &= isinstance(own, (type(text), type(config)))
    found = {name: reasons[name] for name in sites if reasons[name]}
    others = [name for name in sites if not in_text[name]]
    if len(others) < len(set(sites)):
        found |= dict.fromkeys(others, "not in the text part of the model; name its attention in target_modules")
    return found


def in_encoder(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the modules ``names`` that belong to the encoder of a model that also has a decoder."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return []
    encoder = cast(Any, model).get_encoder() if hasattr(model, "get_encoder") else None
    inside = {id(module) for module in encoder.modules()} if isinstance(encoder, nn.Module) else set()
    return [name for name in names if id(model.get_submodule(name)) in inside]


def skipped_attention(model: nn.Module, sites: Iterable[str], others: Mapping[str, str]) -> dict[str, str]:
    """What gets no memory, by name, with the reason: the parts of the model that hold the sites in ``others``,
    further attention modules, and layers without attention beside layers that get a memory."""
    sites = set(sites)
    holders = _with_parents(sites)
    reasons: dict[str, str] = {}
    for name, reason in others.items():
        reasons[next(part for part in _prefixes(name) if part not in holders)] = reason
    attentions = {
        name: module
        for name, module in model.named_modules()
        if families.ATTENTION.search(type(module).__name__) and any(True for _ in module.parameters())
    }
    for name, module in attentions.items():
        if name in holders or any(part in sites or part in reasons for part in _prefixes(name)):
            continue
        inspected = _inspect(module)
        if isinstance(inspected, AttentionSite):
            reasons[name] = "cross attention"
        elif not any(other.startswith(f"{name}.") for other in attentions):  # else what is in it is named
            reasons[name] = inspected
    skipped = _with_parents(reasons)
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n in holders}
    layers: dict[str, str] = {}
    for name, list_of_layers in lists.items():
        if any(name.startswith(f"{outer}.") for outer in lists):  # the parts of one layer
            continue
        for index, layer in enumerate(list_of_layers):
            if f"{name}.{index}" not in holders | skipped:
                layers[f"{name}.{index}"] = f"{type(layer).__name__} has no softmax attention that is known"
    return reasons | layers


def _prefixes(name: str) -> list[str]:
    """``a.b.c`` -> ``[a, a.b, a.b.c]``."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _with_parents(names: Iterable[str]) -> set[str]:
    return {prefix for name in names for prefix in _prefixes(name)}
