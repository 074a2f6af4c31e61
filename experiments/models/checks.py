"""What is asked of a method on one tiny model."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixmemory import PrefixMemoryConfig, PrefixMemoryError
from prefixmemory.tuner.activation import activation
from prefixmemory.tuner.in_feed_forward import InFeedForward
from prefixmemory.tuner.layers import memory_layers

from .base import Facts, is_cross
from .kinds import CAUSAL_LM, LONG, Batch, Kind, build_case, ids
from .running import TOLERANCE, Failed, compare_generate, logits, loss, padding_error, reason

#: A memory in the heads and one beside the feed-forward projections too, as recipes have it.
BLOCKS = "with blocks"
#: Types of which no layer holds both attention and a feed-forward block.
EITHER_KIND = ("nemotron_h", "xlm")
METHODS = ("memory", BLOCKS, "LoRA", "PREFIX_TUNING")
#: A memory's other place, asked for by name: it has no column in docs/models.md.
INSIDE = "inside"


class NotApplicable(Exception):
    """A check cannot be asked of this model or method, and why."""


@dataclass
class Subject:
    """One method on one model, as the checks see it.

    Attributes:
        modules: names of the base model's modules, before anything was attached.
        idle: parameters of the adapter that hang where no gradient flows (an expert that got no token), and so need
            none themselves.
    """

    kind: Kind
    model_type: str
    method: str
    facts: Facts
    base: PreTrainedModel
    base_logits: Tensor
    batch: Batch
    model: PeftModel
    modules: set[str]
    idle: set[str] = field(default_factory=set)


def method_configs(method: str, kind: Kind, config: Any) -> dict[str, PeftConfig]:
    """The configs to try, in this order: a method's own default, then what its documentation says to do without."""
    task = {"task_type": kind.task_type}
    if method == "memory":
        return {"default": PrefixMemoryConfig(**task)}
    if method == BLOCKS:
        return {"default": PrefixMemoryConfig(**task, feed_forward=8)}
    if method == INSIDE:
        return {"default": PrefixMemoryConfig(**task, placement="inside", prefix_length=4)}
    if method == "PREFIX_TUNING":
        prefix = {"task_type": kind.prefix_task or kind.task_type, "num_virtual_tokens": 4}
        names = {"token_dim": "hidden_size", "num_attention_heads": "num_attention_heads"}
        names["num_layers"] = "num_hidden_layers"
        sizes = {field: getattr(config, name, None) for field, name in names.items()}
        return {"default": PrefixTuningConfig(**prefix), "sizes given": PrefixTuningConfig(**prefix, **sizes)}
    configs = {} if config.model_type not in LORA_TARGETS else {"default": LoraConfig(**task, r=4)}
    linear = {**task, "r": 4, "target_modules": "all-linear"}
    return configs | {
        "all-linear": LoraConfig(**linear),
        # PEFT refuses these two in Mamba layers.
        "all-linear but Mamba's": LoraConfig(**linear, exclude_modules=["out_proj", "conv1d"]),
    }


def attach(method: str, kind: Kind, model_type: str) -> tuple[PreTrainedModel, PeftModel, str]:
    """A fresh base model, the same with an untrained adapter of the first config that fits, and that config's name."""
    first_error: Exception | None = None
    for name, config in method_configs(method, kind, build_case(kind, model_type).config).items():
        base = build_case(kind, model_type)
        try:
            return base, get_peft_model(base, config).eval(), name
        except Exception as error:
            first_error = first_error or error
    assert first_error is not None
    raise first_error


#: Of the largest logit: 84 times the rounding step of float32.
RELOADED = 1e-5
#: The same: four rounding steps.
ROUNDED = 5e-7


def adapter(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the method trains, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def fill(model: PeftModel) -> None:
    """Random contents for the adapter, as if it were trained; heads that PEFT trains in full stay as they are."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapter(model).items():
            if "modules_to_save" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def nearest(name: str, names: set[str]) -> str:
    """The longest part of a dotted name, from its beginning, that is among ``names``; empty if none is."""
    while name and name not in names:
        name = name.rpartition(".")[0]
    return name


def idle_parameters(subject: Subject) -> set[str]:
    """The adapter's parameters in modules whose own weights get no gradient, neither without the adapter nor with."""
    model = subject.model
    trained = adapter(model)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    loss(model, subject.batch, subject.model_type).backward()
    own = {name: p for name, p in model.named_parameters() if name not in trained}
    alive = {_short(name) for name, p in own.items() if p.grad is not None and p.grad.any()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    model.zero_grad()

    def flows(module: str) -> bool:
        return module in subject.facts.alive and any(name.startswith(f"{module}.") for name in alive)

    return {name for name in trained if (at := nearest(_short(name), subject.modules)) and not flows(at)}


def check_zero_start(subject: Subject) -> None:
    if subject.method in ("PREFIX_TUNING", INSIDE):
        raise NotApplicable("a prefix starts at random")
    if not torch.equal(logits(subject.model, subject.batch, subject.model_type), subject.base_logits):
        raise Failed("an untrained adapter changes the logits")


def check_every_layer(subject: Subject) -> None:
    """A memory in every self-attention with a softmax through which gradients flow, and only where there is one."""
    if subject.method not in ("memory", BLOCKS, INSIDE):
        raise NotApplicable("asked of memories only")
    found = {n: m._modules["prefix_memory"] for n, m in subject.base.named_modules() if "prefix_memory" in m._modules}
    hosts = {name for name, layer in found.items() if not isinstance(layer, InFeedForward)}
    if subject.method == BLOCKS:
        _check_blocks(subject, hosts, found.keys() - hosts)

    def related(a: str, b: str) -> bool:
        return a == b or a.startswith(f"{b}.") or b.startswith(f"{a}.")

    attends = subject.facts.attends
    parameterised = {name for name, module in subject.base.named_modules() if any(True for _ in module.parameters())}
    without = [
        name
        for name in attends
        if not is_cross(name)
        and nearest(name, parameterised) in subject.facts.alive
        and not any(related(name, h) for h in hosts)
    ]
    if without:
        module = subject.base.get_submodule(without[0])
        raise Failed(
            f"no memory in {len(without)} of {len(attends)} attentions, {without[0]} ({type(module).__name__})"
        )
    elsewhere = [h for h in hosts if h in subject.facts.alive and not any(related(name, h) for name in attends)]
    if elsewhere:
        raise Failed(f"a memory in {elsewhere[0]}, which computes no softmax attention")


def _check_blocks(subject: Subject, hosts: set[str], beside: set[str]) -> None:
    """In each layer with attention a memory beside a whole block, or beside two projections at least."""
    whole = {name for name in beside if _is_whole(subject.base.get_submodule(name))}
    counts = Counter(_layer(name) for name in beside)
    enough = {layer for layer, count in counts.items() if count > 1} | {_layer(name) for name in whole}
    if subject.model_type in EITHER_KIND:
        lacking = [] if enough else sorted(hosts)
    else:
        lacking = sorted(name for name in hosts if _layer(name) not in enough)
    if lacking:
        raise Failed(f"no memory in a feed-forward block beside {lacking[0]}")


def _is_whole(module: nn.Module) -> bool:
    """Whether it is a block, and no projection."""
    return not any(hasattr(module, name) for name in ("in_features", "nf"))


def check_acts(subject: Subject) -> None:
    changed = logits(subject.model, subject.batch, subject.model_type)
    if not changed.isfinite().all():
        raise Failed("the logits with a filled adapter are not finite")
    if torch.equal(changed, subject.base_logits):
        raise Failed("a filled adapter leaves the logits as they are")


def check_silent_front(subject: Subject) -> None:
    """A memory that speaks from a token on leaves the base model's logits before it, bit for bit."""
    if subject.method not in ("memory", BLOCKS) or subject.kind != CAUSAL_LM:
        raise NotApplicable("asked of memories in causal language models only")
    half, own = LONG // 2, subject.base_logits
    # experts multiply all of their tokens at once, so that how a token's numbers are rounded hangs on later ones
    rounding = ROUNDED * float(own.abs().max()) if any("expert" in name for name in subject.modules) else 0.0
    other = dict(subject.batch, input_ids=subject.batch["input_ids"].clone())
    other["input_ids"][:, half:] = ids(*other["input_ids"][:, half:].shape, seed=5)
    with subject.model.disable_adapter():
        ahead = logits(subject.model, other, subject.model_type)
    if (ahead - own)[:, :half].abs().max() > rounding:
        raise NotApplicable("the base model's logits depend on later tokens")
    try:
        with activation([half] * len(own)):
            said = logits(subject.model, subject.batch, subject.model_type)
    except PrefixMemoryError as error:
        raise NotApplicable(f"refused: {error}") from error
    if (said - own)[:, :half].abs().max() > rounding:
        raise Failed("logits in front of the token from which it speaks are not the base model's")
    if (said - own)[:, half:].abs().max() < 1e-3:
        raise Failed("it stays silent behind the token from which it speaks")


def check_gradients(subject: Subject) -> None:
    model = subject.model.train()
    with torch.enable_grad():
        loss(model, subject.batch, subject.model_type).backward()
    bad = {}
    for name, parameter in adapter(model).items():
        if parameter.grad is None:
            bad[name] = "no gradient"
        elif not parameter.grad.isfinite().all():
            bad[name] = "a gradient that is not finite"
        elif not parameter.grad.any():
            bad[name] = "a zero gradient"
    model.zero_grad()
    if not bad:
        return
    with torch.enable_grad():
        subject.idle = idle_parameters(subject)
    asked = adapter(model).keys() - subject.idle
    bad = {name: what for name, what in bad.items() if name in asked}
    if not asked:
        raise Failed("no parameter of the adapter lies where the model computes")
    if bad:
        name = next(iter(bad))
        raise Failed(f"{len(bad)} of {len(asked)} parameters, {_short(name)} for one: {bad[name]}")


def check_step(subject: Subject) -> None:
    model = subject.model
    before = float(loss(model.eval(), subject.batch, subject.model_type))
    snapshot = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = adapter(model)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    with torch.enable_grad():
        loss(model.train(), subject.batch, subject.model_type).backward()
    optimizer.step()
    model.zero_grad()
    after = float(loss(model.eval(), subject.batch, subject.model_type))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, snapshot[name])}
    still = trained.keys() - subject.idle - moved
    if moved - trained.keys():
        raise Failed(f"{_short(min(moved - trained.keys()))} of the base model moved")
    if still:
        raise Failed(f"{len(still)} parameters did not move, {_short(min(still))} for one")
    if after == before:
        raise Failed(f"the loss stayed at {before:.6f}")


def check_generate(subject: Subject) -> None:
    compare_generate(subject.model, subject.kind, subject.model_type, "generate" in subject.facts.positions)


def check_padding(subject: Subject) -> None:
    config, positions = subject.base.config, "padding" in subject.facts.positions
    # A prefix inside stands at one place, so that queries must have the positions that they have alone.
    positions = positions or (subject.method == INSIDE and subject.kind.padding == "left")
    error = padding_error(subject.model, subject.kind, config, subject.model_type, positions)
    with subject.model.disable_adapter():
        own = padding_error(subject.model, subject.kind, config, subject.model_type, positions)
    if not error <= max(TOLERANCE, 2 * own):
        raise Failed(f"logits of a padded row differ by {error:.1g}")


def check_reload(subject: Subject) -> None:
    wanted = logits(subject.model, subject.batch, subject.model_type)
    trained = {name: parameter.detach().clone() for name, parameter in adapter(subject.model).items()}
    with tempfile.TemporaryDirectory() as folder:
        subject.model.save_pretrained(folder)
        # Trainable, as the first one is: torch multiplies in another order where a weight needs no gradient. A prefix
        # is not multiplied, and PEFT refuses it.
        trainable = subject.method != "PREFIX_TUNING"
        base = build_case(subject.kind, subject.model_type)
        again = PeftModel.from_pretrained(base, folder, is_trainable=trainable).eval()
    loaded = dict(again.named_parameters())
    if other := [name for name, tensor in trained.items() if not torch.equal(loaded[name], tensor)]:
        raise Failed(f"the reloaded adapter has other parameters, as {other[0]}")
    # not bit for bit: MKL sums in an order that depends on where in memory a tensor lies
    apart = (logits(again, subject.batch, subject.model_type) - wanted).abs().max()
    if not apart <= RELOADED * wanted.abs().max():
        raise Failed("the reloaded adapter gives other logits")


def check_disable(subject: Subject) -> None:
    with subject.model.disable_adapter():
        off = logits(subject.model, subject.batch, subject.model_type)
    if not torch.equal(off, subject.base_logits):
        raise Failed("disable_adapter does not give the base model's logits")


def check_cross_attention(subject: Subject) -> None:
    """Cross attention can be asked for by name."""
    cross = [name for name in subject.facts.attends if is_cross(name)]
    if subject.method != "memory" or not cross or "decoder_input_ids" not in subject.batch:
        raise NotApplicable("asked of memories in encoder-decoders only")
    model = build_case(subject.kind, subject.model_type)
    config = PrefixMemoryConfig(task_type=subject.kind.task_type, target_modules=cross)
    adapted = get_peft_model(model, config).eval()
    fill(adapted)
    other = Subject(**{**vars(subject), "base": model, "model": adapted, "idle": set()})
    if len(memory_layers(adapted)) != len(cross):
        raise Failed(f"{len(memory_layers(adapted))} memories in {len(cross)} cross attentions")
    check_acts(other)
    check_gradients(other)


#: In this order. The adapter is filled before ``acts``; ``step`` comes last, for it changes the adapter.
CHECKS: dict[str, Callable[[Subject], None]] = {
    "zero start": check_zero_start,
    "every layer": check_every_layer,
    "acts": check_acts,
    "silent front": check_silent_front,
    "gradients": check_gradients,
    "generate": check_generate,
    "padding": check_padding,
    "reload": check_reload,
    "disable": check_disable,
    "cross attention": check_cross_attention,
    "step": check_step,
}


def ask_method(kind: Kind, model_type: str, method: str, facts: Facts) -> dict[str, Any]:
    """All checks of one method on one type: what passed, what failed and why, what could not be asked and why."""
    outcome: dict[str, Any] = {"passed": [], "failed": {}, "not_applicable": {}}
    base = build_case(kind, model_type).requires_grad_(False)  # as a method will have it, for the last bit
    modules = {name for name, _ in base.named_modules() if name}
    batch = kind.inputs(base.config, 2, LONG)
    with torch.no_grad():
        base_logits = logits(base, batch, model_type)
    try:
        base, model, outcome["config"] = attach(method, kind, model_type)
    except Exception as error:
        refused = method == INSIDE and isinstance(error, PrefixMemoryError)
        outcome["not_applicable" if refused else "failed"]["attach"] = reason(error)
        return outcome
    outcome["passed"].append("attach")
    subject = Subject(kind, model_type, method, facts, base, base_logits, batch, model, modules)
    for check, ask in CHECKS.items():
        if check == "acts":
            fill(model)
        if check in facts.cannot:
            outcome["not_applicable"][check] = facts.cannot[check]
            continue
        try:
            with torch.no_grad():
                ask(subject)
        except NotApplicable as why:
            outcome["not_applicable"][check] = str(why)
        except Exception as error:
            outcome["failed"][check] = reason(error)
        else:
            outcome["passed"].append(check)
        model.eval()
    return outcome


def _layer(name: str) -> str:
    """A module's name up to its first number: what it shares with the modules beside it."""
    parts = name.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdecimal()), 0)
    return ".".join(parts[: place + 1])


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.")
