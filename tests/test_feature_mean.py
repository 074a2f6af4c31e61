"""normalize="feature_mean": what φ(q) has in common over the first batch that is trained on is subtracted for good."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import functional as F

import tiny
from close import close_logits, same_parameters
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError, reference
from prefixmemory.tuner.layers import memory_layers

# The name that Trainer, TRL and most scripts call; the new one does not exist in every supported transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")

FIRST, SECOND = tiny.tokens(3, 7, seed=5), tiny.tokens(2, 9, seed=6)
MEAN: dict[str, Any] = {"normalize": "feature_mean"}


def means(model: nn.Module, adapter: str = "default") -> list[Tensor]:
    """μ of every layer, ``[groups, feature_dim]``."""
    return [layer.memory(adapter).mean.clone() for layer in memory_layers(model)]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def train_on(model: nn.Module, ids: Tensor) -> Tensor:
    """One forward and backward pass in training mode; returns the logits."""
    output = model.train()(input_ids=ids, labels=ids, use_cache=False)
    output.loss.backward()
    return output.logits.detach()


def step(model: nn.Module, *batches: Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=30.0)
    for ids in batches:
        train_on(model, ids)
        optimizer.step()
        optimizer.zero_grad()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=SECOND, use_cache=False).logits


def queries(model: PeftModel, ids: Tensor) -> list[Tensor]:
    """Queries before rotation of every layer of the base model, ``[batch, heads, tokens, head_dim]``."""
    kept: list[Tensor] = []
    layers = model.get_base_model().model.layers
    hooks: list[Callable[..., None]] = [lambda module, args, output: kept.append(output) for _ in layers]
    handles = [x.self_attn.q_proj.register_forward_hook(h) for x, h in zip(layers, hooks, strict=True)]
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [q.float().unflatten(-1, (4, 8)).transpose(1, 2) for q in kept]


def common(q: Tensor, groups: int) -> Tensor:
    """The mean of ELU over all tokens and the heads of each group."""
    return torch.stack([F.elu(part).mean(dim=(0, 1, 2)) for part in q.chunk(groups, dim=1)])


# When it is taken


@pytest.mark.parametrize(
    ("config", "groups"),
    [(tiny.DEFAULT, 4), (MEAN, 4), ({**tiny.DEFAULT, "share_heads": True}, 2)],
    ids=["default", "full", "share_heads"],
)
def test_the_first_batch_trained_on_sets_the_mean_and_nothing_else_does(config, groups):
    model = tiny.with_memory(tiny.build(), fill=False, **config)
    expected = [common(q, groups) for q in queries(model, FIRST)]
    with torch.no_grad():
        model.train()(input_ids=SECOND)  # training mode without gradients: an evaluation that forgot eval()
    assert not any(mean.any() for mean in means(model))
    model.eval()(input_ids=SECOND)  # gradients without training mode: it may be the first batch, and was none
    others = [common(q, groups) for q in queries(model, SECOND)]
    for mean, of_batch in zip(means(model), others, strict=True):
        torch.testing.assert_close(mean, of_batch, atol=1e-6, rtol=1e-5)

    step(model, FIRST)
    taken = means(model)
    for mean, of_batch in zip(taken, expected, strict=True):
        assert mean.shape == (groups, 8)
        torch.testing.assert_close(mean, of_batch, atol=1e-6, rtol=1e-5)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(taken, others, strict=True))  # another batch has another

    step(model, SECOND, FIRST)
    logits(model)
    assert equal(means(model), taken)


def test_a_loop_in_evaluation_mode_takes_it_from_its_first_batch_too():
    """A pretrained model comes in that mode, and ``get_peft_model`` leaves it so."""
    model = tiny.with_memory(tiny.build().eval(), fill=False, **tiny.DEFAULT)
    expected = [common(q, 4) for q in queries(model, FIRST)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=30.0)
    model(input_ids=SECOND)  # a look, before training
    for ids in (FIRST, SECOND):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not model.training
    for mean, of_batch in zip(means(model), expected, strict=True):
        torch.testing.assert_close(mean, of_batch, atol=1e-6, rtol=1e-5)
    assert any(parameter.any() for name, parameter in tiny.memory_parameters(model).items() if name.endswith(".B"))


def test_without_it_there_is_none():
    for normalize in ("none", "query_rms", "feature_l2"):
        model = tiny.with_memory(tiny.build(), normalize=normalize)
        assert not tiny.means(model)
    assert PrefixMemoryConfig().normalize == "feature_mean"
    assert PrefixMemoryConfig(prefix_length=3).normalize == "none"
    model = tiny.with_memory(tiny.build(), **tiny.DEFAULT)
    assert len(tiny.means(model)) == 2


# What it does


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_first_pass_changes_no_answer_in_any_precision(dtype):
    base = tiny.build().to(dtype)
    with torch.no_grad():
        expected = base(input_ids=FIRST, use_cache=False).logits
    model = tiny.with_memory(base, fill=False, **tiny.DEFAULT)
    assert torch.equal(train_on(model, FIRST), expected)
    for mean, q in zip(means(model), queries(model, FIRST), strict=True):
        assert mean.dtype == torch.float32  # as the memory itself on such a base
        torch.testing.assert_close(mean, common(q, 4), atol=1e-6, rtol=1e-5)
    step(model, FIRST)
    before = means(model)
    assert not torch.equal(train_on(model, FIRST), expected)  # control: once it has learned, there is an answer
    assert equal(means(model), before)


@pytest.mark.parametrize("config", [MEAN, {**MEAN, "rank": 2, "share_heads": True}], ids=str)
def test_the_read_is_that_of_the_reference(config):
    model = tiny.with_memory(tiny.build(), **config)  # filled, the mean too
    for layer, q in zip(memory_layers(model), queries(model, FIRST), strict=True):
        memory, repeats = layer.memory("default"), 4 // layer.memory("default").groups
        matrix, mean = (x.detach().repeat_interleave(repeats, dim=0) for x in (memory.matrix(), memory.mean))
        expected = reference.read_memory(q, matrix, reference.feature_mean(F.elu, mean))
        torch.testing.assert_close(memory(q.transpose(1, 2)).transpose(1, 2), expected, atol=1e-5, rtol=0)
        assert (reference.read_memory(q, matrix, F.elu) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_takes_the_same_mean_and_gives_the_same_gradients(use_reentrant):
    """Reentrant checkpointing runs the first pass without gradients; the mean is taken when it computes again."""
    models = [tiny.with_memory(tiny.build(), fill=False, **tiny.DEFAULT) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())  # A starts at random
    models[1].gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    models[1].enable_input_require_grads()
    for number, ids in enumerate((FIRST, SECOND)):
        gradients = []
        for model in models:
            train_on(model, ids)
            gradients.append([p.grad.clone() for p in tiny.memory_parameters(model).values()])
            torch.optim.SGD(tiny.memory_parameters(model).values(), lr=30.0).step()
            model.zero_grad()
        for one, other in zip(*gradients, strict=True):
            assert number == 0 or one.abs().max() > 1e-5  # A's gradient is zero at first
            torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-5)
        assert all(mean.any() for mean in means(models[0]))
        for one, other in zip(means(models[0]), means(models[1]), strict=True):
            torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-5)


# Adapters, copies, files


def test_every_adapter_has_a_mean_of_its_own():
    model = tiny.with_memory(tiny.build(), fill=False, **tiny.DEFAULT)
    model.add_adapter("other", PrefixMemoryConfig(task_type="CAUSAL_LM"))
    step(model, FIRST)
    first = means(model)
    assert all(mean.any() for mean in first) and not any(mean.any() for mean in means(model, "other"))
    model.set_adapter("other")
    step(model, SECOND)
    assert equal(means(model), first)
    # no answer was in the way: only "other" was active, and it had learned nothing
    for mean, q in zip(means(model, "other"), queries(model, SECOND), strict=True):
        torch.testing.assert_close(mean, common(q, 4), atol=1e-6, rtol=1e-5)


def test_a_copy_goes_its_own_way():
    model = tiny.with_memory(tiny.build(), fill=False, **tiny.DEFAULT)
    twin = copy.deepcopy(model)
    step(model, FIRST)
    assert not any(mean.any() for mean in means(twin))
    step(twin, SECOND)
    assert not equal(means(twin), means(model))
    again = copy.deepcopy(model)
    same_parameters(again, model)
    close_logits(logits(again), logits(model))
    step(again, SECOND)
    assert equal(means(again), means(model))


def test_a_loaded_memory_keeps_its_mean_when_it_is_trained_on(tmp_path: Path):
    model = tiny.with_memory(tiny.build(), fill=False, **tiny.DEFAULT)
    step(model, FIRST, SECOND)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path, is_trainable=True)
    assert equal(means(loaded), means(model)) and all(mean.any() for mean in means(loaded))
    same_parameters(loaded, model)
    close_logits(logits(loaded), logits(model))
    before = logits(loaded)
    step(loaded, SECOND)
    assert equal(means(loaded), means(model))
    assert not torch.equal(logits(loaded), before)


# Sums


def two_trained(first: dict[str, Any], second: dict[str, Any], **alike: Any) -> PeftModel:
    """A model with the adapters ``default`` and ``other``, filled, whose means differ."""
    model = tiny.with_memory(tiny.build(), **MEAN, **alike, **first)
    config = {"rank": None, "output_limit": None, **MEAN, **alike, **second}
    model.add_adapter("other", PrefixMemoryConfig(task_type="CAUSAL_LM", **config))
    tiny.randomize(model, "other", seed=3)
    assert not equal(means(model), means(model, "other"))
    return model.eval()


def answers(model: PeftModel, adapter: str) -> list[Tensor]:
    return [layer.memory(adapter)(torch.randn(2, 5, 4, 8, generator=torch.Generator().manual_seed(i)))
            for i, layer in enumerate(memory_layers(model))]  # fmt: skip


@pytest.mark.parametrize("share_heads", [False, True])
@pytest.mark.parametrize(("first", "second"), [({"rank": 2}, {"rank": 3}), ({"rank": 2}, {}), ({}, {})], ids=str)
def test_memories_with_different_means_are_summed(first, second, share_heads, tmp_path):
    """Low ranks always are, as long as they fit into the features; full memories where their sum can be inverted."""
    model = two_trained(first, second, share_heads=share_heads)
    model.add_weighted_adapter(["default", "other"], [0.7, -1.3], "sum")
    for a, b, both in zip(*(answers(model, name) for name in ("default", "other", "sum")), strict=True):
        torch.testing.assert_close(both, 0.7 * a - 1.3 * b, atol=2e-5, rtol=0)
        assert (both - a).abs().max() > 1e-2
    model.base_model.set_adapter("sum")
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path / "sum")
    same_parameters(get_peft_model_state_dict(loaded), get_peft_model_state_dict(model, adapter_name="sum"))
    close_logits(logits(loaded), expected)


@pytest.mark.parametrize("case", ["two low ranks beyond the features", "full memories that cancel"])
def test_means_that_no_single_one_stands_for_are_refused_and_leave_the_model_as_it_was(case):
    low = case.startswith("two")
    rank = {"rank": 6} if low else {}  # 12 columns of 8 features; or M − M, which says nothing whatever the mean
    model = two_trained(rank, rank)
    if not low:
        for layer in memory_layers(model):
            layer.memory("other").M.data.copy_(layer.memory("default").M)
    before, names = logits(model), list(model.state_dict())
    with pytest.raises(PrefixMemoryError, match="subtract different means") as refusal:
        model.add_weighted_adapter(["default", "other"], [1.0, -1.0], "sum")
    assert "\n" not in str(refusal.value) and "set_adapter([...])" in str(refusal.value)
    assert list(model.peft_config) == ["default", "other"]
    assert list(model.state_dict()) == names and torch.equal(logits(model), before)
