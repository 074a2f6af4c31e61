"""The only contact with the attention of other people's models.

A memory needs three things of an attention module: the query of every head before rotation, the query as attention
sees it, and the place where the heads' outputs stand side by side, before the output projection. How families differ
in the first and the third is data (the tables below); the second comes through transformers' attention interface.

Nothing in the base model is replaced: hooks read and add, and are removed again by ``unload``. For ``query="rotary"``
one function of transformers is wrapped, once a process (``install_query_tap``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_utils import AttentionInterface

from prefixmemory.errors import PrefixMemoryError

#: Name of the child under which a memory layer hangs in an attention module.
CHILD = "prefix_memory"

Layout = Literal["query", "query_first", "per_head"]


@dataclass(frozen=True)
class QueryProjection:
    """How families write their query.

    Attributes:
        child: name of the child of the attention module.
        layout: where the query lies in what the child returns: ``query`` ``[.., H*D]``, nothing else; ``query_first``
            ``[.., H*D | keys | values]``; ``per_head`` ``[.., H, (query | key | value)]``.
        classes: prefixes of attention class names; a fused projection means different things in different families.
    """

    child: str
    layout: Layout
    classes: tuple[str, ...] = ("",)


QUERY_PROJECTIONS = (
    QueryProjection("q_proj", "query"),  # Llama, Mistral, Qwen, Gemma, OPT, ...
    QueryProjection("qkv_proj", "query_first", ("Phi3", "Phi4")),
    QueryProjection("c_attn", "query_first", ("GPT2",)),
    QueryProjection("query_key_value", "per_head", ("GPTNeoX",)),
)
#: Child that normalises the query between projection and rotation; its output is [.., T, H, D], [.., H, T, D] or flat.
QUERY_NORMS = ("q_norm", "q_layernorm")
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense")
HEAD_DIM_ATTRIBUTES = ("head_dim", "head_size")
HEADS_ATTRIBUTES = ("num_heads", "num_attention_heads", "n_head", "n_heads")
CROSS_ATTENTION_NAMES = ("encoder_attn", "crossattention", "cross_attn")


@dataclass(frozen=True)
class AttentionSite:
    """One attention module, with the sizes read off its live projections.

    Attributes:
        module: the attention module.
        query_source: its child whose output holds the query; ``layout`` says where.
        normed: whether ``query_source`` is a q-norm rather than the projection.
        output_projection: its child that reads the heads' outputs, ``[.., heads * value_dim]``.
        heads, kv_heads: number of query heads and of key/value heads.
        head_dim, value_dim: size of one query and of one head's output.
    """

    module: nn.Module
    query_source: nn.Module
    normed: bool
    layout: Layout
    output_projection: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int

    def query_from(self, output: Tensor, source_input: Tensor) -> Tensor:
        """The content query ``[batch.., tokens, heads, head_dim]`` in what ``query_source`` returned."""
        by_head = (*output.shape[:-1], self.heads, -1)
        if self.normed:
            if output.shape[-1] != self.head_dim:
                return output.reshape(by_head)
            heads_second_to_last = output.shape[-2] == self.heads
            if output.shape[-3] == self.heads and heads_second_to_last:
                # As many tokens as heads: the norm's input is a view of the projection's rows, so of the two axes
                # the one with the larger stride counts tokens.
                heads_second_to_last = source_input.stride(-3) > source_input.stride(-2)
            return output if heads_second_to_last else output.transpose(-2, -3)
        if self.layout == "per_head":
            return output.reshape(by_head)[..., : self.head_dim]
        return output[..., : self.heads * self.head_dim].reshape(by_head)

    def intact(self) -> bool:
        """Whether the hooked children are still the module's own (nothing wrapped them since)."""
        children = self.module._modules.values()
        return any(c is self.query_source for c in children) and any(c is self.output_projection for c in children)

    def hook(
        self, on_query: Callable[..., None], on_output: Callable[..., tuple[Any, ...]]
    ) -> tuple[RemovableHandle, RemovableHandle]:
        """Call ``on_query(module, args, output)`` after the query source, ``on_output(module, args)`` before the
        output projection; the latter returns the changed arguments."""
        return (
            self.query_source.register_forward_hook(on_query),
            self.output_projection.register_forward_pre_hook(on_output),
        )


def is_cross_attention(name: str, module: nn.Module) -> bool:
    """Whether an attention module reads keys from another sequence."""
    return name.rpartition(".")[2] in CROSS_ATTENTION_NAMES or bool(getattr(module, "is_cross_attention", False))


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    children = dict(module.named_children())
    return next((children[name] for name in names if name in children), None)


def _declared(module: nn.Module, attributes: tuple[str, ...]) -> int | None:
    """The first of ``attributes`` that the module or else its config has."""
    for holder in (module, getattr(module, "config", None)):
        for attribute in attributes:
            value = getattr(holder, attribute, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _out_features(projection: nn.Module) -> int:
    return int(getattr(projection, "out_features", None) or projection.nf)  # type: ignore[arg-type]  # nf: Conv1D


def _in_features(projection: nn.Module) -> int:
    return int(getattr(projection, "in_features", None) or projection.nx)  # type: ignore[arg-type]  # nx: Conv1D


def find_site(module: nn.Module) -> AttentionSite | None:
    """Describe ``module`` as an attention site, or ``None`` if it is no softmax attention that we know.

    The widths of the live projections must agree with the number of heads that the module declares: a family that
    lays its query out otherwise is not known, rather than read wrongly. Linear-attention and state-space mixers have
    other children, or carry ``Linear`` or ``Lightning`` in their name.
    """
    kind = type(module).__name__
    if "Attention" not in kind or "Linear" in kind or "Lightning" in kind:
        return None
    children = dict(module.named_children())
    projection = next((p for p in QUERY_PROJECTIONS if p.child in children and kind.startswith(p.classes)), None)
    output_projection = _child(module, OUTPUT_PROJECTIONS)
    head_dim = _declared(module, HEAD_DIM_ATTRIBUTES)
    if projection is None or output_projection is None or head_dim is None:
        return None
    query_projection = children[projection.child]
    norm = _child(module, QUERY_NORMS)
    width = _out_features(query_projection)
    heads = _declared(module, HEADS_ATTRIBUTES)
    if heads is None and projection.layout == "query":
        heads = width // head_dim
    if heads is None or _in_features(output_projection) % heads:
        return None
    keys = children.get("k_proj")
    kv_heads = _declared(module, ("num_key_value_heads",)) if keys is None else _out_features(keys) // head_dim
    kv_heads = kv_heads or heads
    widths = {
        # A q-norm sees the query alone, also where the projection returns a gate beside it.
        "query": {heads * head_dim, 2 * heads * head_dim} if norm is not None else {heads * head_dim},
        "query_first": {(heads + 2 * kv_heads) * head_dim},
        "per_head": {3 * heads * head_dim},
    }
    if width not in widths[projection.layout] or heads % kv_heads:
        return None
    return AttentionSite(
        module=module,
        query_source=query_projection if norm is None else norm,
        normed=norm is not None,
        layout=projection.layout,
        output_projection=output_projection,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=_in_features(output_projection) // heads,
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
        raise PrefixMemoryError(
            f"{type(model).__name__} has no softmax self-attention that prefixmemory knows, so there is nowhere to "
            "put a memory. Use a transformer with softmax attention, or add its family to the tables in "
            "prefixmemory/attention.py (CONTRIBUTING.md says how)."
        )
    return sites


def skipped_attention(model: nn.Module, sites: Iterable[str]) -> dict[str, str]:
    """Layers without a memory beside layers that get one, and attention modules that get none: name and reason."""
    sites = set(sites)

    def has_site(name: str) -> bool:
        return any(site == name or site.startswith(f"{name}.") for site in sites)

    reasons = {}
    for name, module in model.named_modules():
        in_site = any(name.startswith(f"{site}.") for site in sites)
        if isinstance(module, nn.ModuleList) and has_site(name) and not in_site:
            for index, layer in enumerate(module):
                if not has_site(f"{name}.{index}"):
                    reasons[f"{name}.{index}"] = f"{type(layer).__name__} has no softmax attention that is known"
        elif "Attention" in type(module).__name__ and not has_site(name) and not in_site:
            cross = is_cross_attention(name, module)
            reasons[name] = "cross attention" if cross else f"{type(module).__name__} is not known"
    return reasons


def check_rotary(name: str, site: AttentionSite) -> None:
    """Refuse ``query="rotary"`` where the query that attention sees cannot be had."""
    forward = type(site.module).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    if "ALL_ATTENTION_FUNCTIONS" not in forward.__globals__:
        raise PrefixMemoryError(
            f"query='rotary' cannot be read from {name} ({type(site.module).__name__}): this model does not use "
            "transformers' attention interface. Use query='content'."
        )


def install_query_tap() -> None:
    """Let memory layers see the query that attention functions receive, in every model and backend.

    ``AttentionInterface.get_interface`` hands out the attention function of each call; what it hands out is wrapped
    so that a memory layer hanging in the calling module is shown the query first. Without such a layer the wrapper
    only passes its arguments on. Installed once, when the first memory with ``query="rotary"`` is made.
    """
    original = AttentionInterface.get_interface
    if getattr(original, "_shows_query_to_memories", False):
        return

    def get_interface(self: AttentionInterface, attn_implementation: str, default: Callable[..., Any]) -> Any:
        function = original(self, attn_implementation, default)

        def attend(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            layer = module._modules.get(CHILD)
            if layer is not None:
                layer.rotary_query = query.transpose(1, 2)  # [B, H, T, D] -> [B, T, H, D]
            return function(module, query, *args, **kwargs)

        return attend

    get_interface._shows_query_to_memories = True  # type: ignore[attr-defined]
    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]


def placement(site: AttentionSite) -> tuple[torch.device | None, torch.dtype | None]:
    """Device on which a site computes, and its floating-point dtype; ``None`` where it cannot be said.

    Weights that accelerate keeps elsewhere lie on the meta device; its hook knows where they compute.
    """
    weight = next(site.output_projection.parameters())
    device: torch.device | None = weight.device
    if weight.is_meta:
        device = getattr(getattr(site.output_projection, "_hf_hook", None), "execution_device", None)
        device = None if device is None else torch.device(device)
    compute_dtype = getattr(site.output_projection, "compute_dtype", weight.dtype)  # bitsandbytes keeps it aside
    return device, compute_dtype if compute_dtype.is_floating_point else None
