"""output_limit: an answer never comes near drowning its head's own output, and short answers are as in the paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F

import tiny
from prefixmemory import PrefixMemoryConfig, reference
from prefixmemory.kernels.limit import add

LIMIT = 0.3


def length(x: Tensor) -> Tensor:
    """Of each head's vector."""
    return x.norm(dim=-1, keepdim=True)


@dataclass
class Seen:
    """What a layer's attention showed: ``[batch, tokens, heads, head_dim]``."""

    query: Tensor
    own: Tensor
    added: Tensor


def look(model: PeftModel, **inputs: Any) -> list[Seen]:
    """Query, the heads' own outputs, and what was added to them, of every layer."""
    kept: list[dict[str, Tensor]] = []
    handles = []

    def keep(into: dict[str, Tensor], name: str) -> Callable[..., None]:
        return lambda module, args, *output: into.update({name: (output or args)[0].unflatten(-1, (4, 8))})

    for layer in model.base_model.model.model.layers:
        seen: dict[str, Tensor] = {}
        kept.append(seen)
        project = layer.self_attn.o_proj
        handles += [
            layer.self_attn.q_proj.register_forward_hook(keep(seen, "query")),
            project.register_forward_pre_hook(keep(seen, "own"), prepend=True),
            project.register_forward_pre_hook(keep(seen, "all")),
        ]
    with torch.no_grad():
        model(input_ids=tiny.tokens(), use_cache=False, **inputs)
    for handle in handles:
        handle.remove()
    return [Seen(seen["query"], seen["own"], seen["all"] - seen["own"]) for seen in kept]


def multiply(model: PeftModel, factor: float) -> None:
    """The contents of a full memory, or of the second factor of one in two."""
    with torch.no_grad():
        for name, parameter in tiny.memory_parameters(model).items():
            if not name.endswith(".A"):
                parameter.mul_(factor)


# The function


@pytest.mark.parametrize("limit", [0.1, LIMIT, 5.0])
def test_the_module_and_the_reference_are_the_formula(limit):
    answer, own = torch.randn(2, 4, 5, 8) * torch.logspace(-4, 4, 5)[:, None], torch.randn(2, 4, 5, 8)
    expected = answer / (1 + (length(answer) / (limit * length(own))) ** 2).sqrt()
    torch.testing.assert_close(reference.limited(answer, own, limit), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(add(own, answer, limit, onto=torch.zeros_like(own)), expected, rtol=1e-5, atol=0)
    assert (length(expected) < limit * length(own) * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_what_full_precision_gives(dtype):
    """Squares of such answers overflow in float16, and the factor is below its smallest normal number."""
    answer, own = (torch.randn(3, 4, 8) * 1e4).to(dtype), (torch.randn(3, 4, 8) * 1e-3).to(dtype)
    limited = add(own, answer, LIMIT, onto=torch.zeros_like(own))
    assert limited.dtype == dtype
    expected = add(own.float(), answer.float(), LIMIT, onto=torch.zeros_like(own.float()))
    torch.testing.assert_close(limited.float(), expected, rtol=0.02, atol=1e-6)


# In a model


def test_short_answers_pass_nearly_as_they_are():
    paper, limited = tiny.with_memory(tiny.build()), tiny.with_memory(tiny.build(), output_limit=LIMIT)
    for model in (paper, limited):
        multiply(model, 1e-4)
    for free, held in zip(look(paper), look(limited), strict=True):
        ratio = length(held.added) / length(free.added)
        assert length(free.added).min() > 0 and (ratio - 1).abs().max() < 0.05
    # control: the same contents, not so small, do not pass
    for model in (paper, limited):
        multiply(model, 1e4)
    assert all((length(b.added) < 0.5 * length(a.added)).any() for a, b in zip(look(paper), look(limited), strict=True))


@pytest.mark.parametrize("config", [{"output_limit": LIMIT}, tiny.DEFAULT, {"output_limit": 2.0, "share_heads": True}])
def test_no_answer_is_longer_than_the_limit_whatever_the_contents(config):
    model = tiny.with_memory(tiny.build(), **config)
    multiply(model, 1e6)
    for seen in look(model):
        share = length(seen.added) / length(seen.own)
        assert (share < config["output_limit"] * (1 + 1e-4)).all()
        assert (share > 0.9 * config["output_limit"]).all()  # that long, for such contents

    unlimited = tiny.with_memory(tiny.build(), **{**config, "output_limit": None})
    multiply(unlimited, 1e6)
    assert all((length(seen.added) > 100 * length(seen.own)).all() for seen in look(unlimited))


@pytest.mark.parametrize("size", [0.0, 1.0, 1e6])
@pytest.mark.parametrize("config", [{"output_limit": LIMIT}, tiny.DEFAULT], ids=str)
def test_heads_that_say_nothing_give_no_nan(config, size):
    """Their output is exactly zero, and gradients pass through it too: the base model's parameters take them here."""
    base = tiny.build()
    with torch.no_grad():
        for layer in base.model.layers:
            layer.self_attn.v_proj.weight[:8] = 0  # the first key/value head: query heads 0 and 1
    model = tiny.with_memory(base, **config)
    multiply(model, size)
    for seen in look(model):
        assert not seen.own[:, :, :2].any() and seen.own[:, :, 2:].all()
        assert length(seen.added[:, :, :2]).max() < 1e-5  # no longer than nothing
        assert size == 0 or length(seen.added[:, :, 2:]).min() > 0

    model.requires_grad_(True)
    logits = model(input_ids=tiny.tokens(), use_cache=False).logits
    (logits * torch.randn(logits.shape)).sum().backward()
    assert torch.isfinite(logits).all()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    assert [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()] == []
    assert all(g.any() for n, g in gradients.items() if "v_proj" in n)


def test_the_first_gradient_is_that_of_the_paper():
    gradients = []
    for config in ({"output_limit": LIMIT}, {}):
        model = tiny.with_memory(tiny.build(), fill=False, **config)
        model(input_ids=tiny.tokens(), labels=tiny.tokens(), use_cache=False).loss.backward()
        gradients.append([p.grad for p in tiny.memory_parameters(model).values()])
    for limited, paper in zip(*gradients, strict=True):
        assert paper.abs().max() > 0
        torch.testing.assert_close(limited, paper, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("base", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16], ids=str)
def test_every_precision_trains_without_nan(base, autocast):
    model = tiny.with_memory(tiny.build().to(base), **tiny.DEFAULT)
    multiply(model, 100.0)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss = model(input_ids=tiny.tokens(), labels=tiny.tokens(), use_cache=False).loss
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in tiny.memory_parameters(model).items():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.any(), name


# Sums


@pytest.mark.parametrize(
    ("first", "second"),
    [({}, {}), ({"rank": 2}, {"rank": 3}), ({"rank": 2}, {}), ({"scale": 0.5}, {"scale": 2.0})],
    ids=str,
)
def test_the_weighted_adapter_limits_the_answer_of_the_summed_memory(first, second):
    model = tiny.with_memory(tiny.build(), output_limit=LIMIT, **first)
    second = {"rank": None, "normalize": "none", **second}
    model.add_adapter("other", PrefixMemoryConfig(task_type="CAUSAL_LM", output_limit=LIMIT, **second))
    tiny.randomize(model, "other", seed=3)
    model.add_weighted_adapter(["default", "other"], [0.7, -1.3], "mix")
    assert model.peft_config["mix"].output_limit == LIMIT
    memories = [
        scale * model.base_model.model.model.layers[0].self_attn.prefix_memory.memory(name).matrix()
        for name, scale in (("default", 0.7 * first.get("scale", 1.0)), ("other", -1.3 * second.get("scale", 1.0)))
    ]
    found = {}
    for name in ("default", "other", "mix"):
        model.base_model.set_adapter(name)
        found[name] = look(model)[0]
    query, own = (x.transpose(1, 2) for x in (found["mix"].query, found["mix"].own))
    expected = reference.limited(reference.read_memory(query, memories[0] + memories[1], F.elu), own, LIMIT)
    torch.testing.assert_close(found["mix"].added, expected.transpose(1, 2), atol=1e-5, rtol=0)
    # and so is not the sum of the limited answers
    apart = 0.7 * found["default"].added - 1.3 * found["other"].added
    assert (found["mix"].added - apart).abs().max() > 1e-3
