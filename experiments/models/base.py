"""What a base model does by itself, before any adapter: so that no method is blamed for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from .kinds import LONG, SHORT, Batch, Kind, build_case
from .running import TOLERANCE, Failed, compare_generate, logits, loss, padding_error, reason


@dataclass
class Facts:
    """What the base model does by itself.

    Attributes:
        attends: modules in which softmax attention was computed in a forward pass.
        alive: modules with a parameter that gets a gradient in a forward and backward pass.
        positions: checks in which forward passes need ``position_ids``: left padding where positions are absolute,
            generation where ``generate`` counts positions otherwise than a forward pass does.
        cannot: checks that the base model itself fails, and why.
    """

    class_name: str = ""
    attends: list[str] = field(default_factory=list)
    alive: set[str] = field(default_factory=set)
    positions: set[str] = field(default_factory=set)
    cannot: dict[str, str] = field(default_factory=dict)


class _Attention(TorchDispatchMode):
    """Notes in which module softmax attention is computed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.seen: dict[str, None] = {}  # an ordered set
        self.handles = []
        for name, module in model.named_modules():
            self.handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.stack.append(name)))
            self.handles.append(module.register_forward_hook(self._leave, always_call=True))

    def _leave(self, *_: Any) -> None:
        self.stack.pop()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.stack and (sizes := _queries_and_keys(str(function), args)) is not None:
            queries, keys = sizes
            # Not the softmax over experts or over the streams of a residual, of which there are fewer than tokens; not
            # one query for all tokens, which only pools them.
            if keys >= SHORT and queries > 1:
                self.seen[self.stack[-1]] = None
        return function(*args, **(kwargs or {}))


def _queries_and_keys(name: str, args: Any) -> tuple[int, int] | None:
    """How many queries meet how many keys in an operation that may be the softmax of an attention."""
    if "backward" in name:
        return None
    if "scaled_dot_product" in name:
        return args[0].shape[-2], args[1].shape[-2]
    if "softmax" in name or "logsumexp" in name:
        over = args[1] if isinstance(args[1], int) else args[1][0]
        if args[0].ndim > 2 and over in (-1, args[0].ndim - 1):  # keys stand last
            return args[0].shape[-2], args[0].shape[-1]
    return None


def is_cross(name: str) -> bool:
    """Whether an attention reads another sequence, by the words that models have for it."""
    return any(word in name.lower() for word in ("cross", "encdec", "encoder_attn"))


def alive_modules(model: nn.Module) -> set[str]:
    """Modules with a parameter that has a gradient."""
    alive = set()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            while name:
                name = name.rpartition(".")[0]
                alive.add(name)
    return alive


def ask_base(kind: Kind, model_type: str) -> Facts:
    """Build the base model and find out what it does by itself. What it raises is why it cannot be run."""
    model = build_case(kind, model_type)
    facts = Facts(class_name=type(model).__name__)
    batch = kind.inputs(model.config, 2, LONG)
    watch = _Attention(model)
    with torch.no_grad(), watch:
        first = logits(model, batch, model_type)
    for handle in watch.handles:
        handle.remove()
    facts.attends = list(watch.seen)
    if not first.isfinite().all():
        raise Failed("its outputs are not finite")
    with torch.no_grad():
        if not torch.equal(first, logits(model, batch, model_type)):
            raise Failed("two forward passes of the base model differ")

    def attempt(check: str, ask: Callable[[], None]) -> None:
        try:
            ask()
        except Exception as error:
            facts.cannot[check] = f"the base model: {reason(error)}"

    attempt("gradients", lambda: _base_gradients(model, facts, batch, model_type))
    if "gradients" in facts.cannot:
        facts.cannot["step"] = facts.cannot["gradients"]
    if kind.generates:
        attempt("generate", lambda: _base_generate(model, kind, facts, model_type))
    else:
        facts.cannot["generate"] = "does not generate"
    if kind.padding:
        attempt("padding", lambda: _base_padding(model, kind, facts, model_type))
    else:
        facts.cannot["padding"] = "rows of one size"
    return facts


def _base_gradients(model: PreTrainedModel, facts: Facts, batch: Batch, model_type: str) -> None:
    model.train()
    loss(model, batch, model_type).backward()
    facts.alive = alive_modules(model)
    model.zero_grad()
    model.eval()


@torch.no_grad()
def _base_padding(model: PreTrainedModel, kind: Kind, facts: Facts, model_type: str) -> None:
    error = padding_error(model, kind, model.config, model_type, positions=False)
    if error > TOLERANCE and kind.padding == "left":
        facts.positions.add("padding")
        error = padding_error(model, kind, model.config, model_type, positions=True)
    if error > TOLERANCE:
        raise Failed(f"logits of a padded row differ by {error:.1g}")


@torch.no_grad()
def _base_generate(model: PreTrainedModel, kind: Kind, facts: Facts, model_type: str) -> None:
    try:
        compare_generate(model, kind, model_type, positions=False)
    except Failed:
        if kind.task_type != "CAUSAL_LM":
            raise
        facts.positions.add("generate")
        compare_generate(model, kind, model_type, positions=True)
