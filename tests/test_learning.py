"""What should learn moves, what is frozen does not, and an untrained memory starts at zero."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import tiny
from close import close_logits, same_parameters
from prefixmemory import PrefixMemoryConfig
from prefixmemory.memories.matrix import MatrixMemory
from prefixmemory.memories.registry import MemorySite

FAMILIES = ["llama_gqa", "qwen3", "phi3", "gpt2"]
#: Config of each variant, and which of its parameters move in the first step. The others have a gradient of exactly
#: zero while M (or B) is zero, and follow in the second step.
VARIANTS = {
    "default": (tiny.DEFAULT, {"B"}),
    "paper": ({"rank": None, "output_limit": None, "normalize": "none"}, {"M"}),
    "full": ({"rank": None}, {"M"}),
    "rotary": ({"rank": None, "query": "rotary", "output_limit": None}, {"M"}),
    "rank": ({"rank": 2}, {"B"}),
    "share_heads": ({"rank": None, "share_heads": True}, {"M"}),
    "mlp": ({"rank": None, "feature_map": "mlp"}, {"M"}),
    "rank_mlp": ({"feature_map": "mlp", "rank": 2}, {"B"}),
}


def adapted_model(family: str, dtype: torch.dtype = torch.float32, **config: object) -> nn.Module:
    config = PrefixMemoryConfig(task_type="CAUSAL_LM", **{"normalize": "none", **config})
    return get_peft_model(tiny.build(family).to(dtype), config)


def optimizer_of(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    # No weight decay: it would move a parameter whose gradient is zero.
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    model.train()
    ids = tiny.tokens(rows=4, length=12)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in tiny.memory_parameters(model).items()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> tuple[set[str], set[str]]:
    """Names of parameters of which every group (every head's memory) moved, and of which none did."""
    everywhere, nowhere = set(), set()
    for name, parameter in tiny.memory_parameters(model).items():
        groups = (parameter.detach() != before[name]).flatten(1).any(dim=1)
        if groups.all():
            everywhere.add(name)
        if not groups.any():
            nowhere.add(name)
    return everywhere, nowhere


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_parameter_moves_in_the_step_in_which_it_should(family, variant):
    config, first = VARIANTS[variant]
    model = adapted_model(family, **config)
    model.eval()
    with torch.no_grad():  # what a trainer does before the first step; must not leave anything behind
        model(input_ids=tiny.tokens(), use_cache=False)
    optimizer = optimizer_of(model)
    names = set(tiny.memory_parameters(model))
    early = {name for name in names if name.rpartition(".")[2] in first}
    assert len(early) == 2  # one a layer

    before = snapshot(model)
    train_step(model, optimizer)
    everywhere, nowhere = moved(model, before)
    assert everywhere == early
    assert nowhere == names - early

    for _ in range(2):
        before = snapshot(model)
        train_step(model, optimizer)
        assert moved(model, before) == (names, set())

    model.eval()
    with torch.no_grad():
        model(input_ids=tiny.tokens(), use_cache=False)
    before = snapshot(model)
    train_step(model, optimizer)
    assert moved(model, before) == (names, set())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_lower_the_loss_and_leave_the_base_model_bit_identical(family, variant):
    base = tiny.build(family)
    frozen = {name: t.detach().clone() for name, t in [*base.named_parameters(), *base.named_buffers()]}
    config = PrefixMemoryConfig(task_type="CAUSAL_LM", **VARIANTS[variant][0])
    model = get_peft_model(base, config)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(tiny.memory_parameters(model))

    optimizer = optimizer_of(model)
    losses = [train_step(model, optimizer) for _ in range(20)]

    assert losses[-1] < losses[0] - 0.01
    after = {name: t for name, t in [*base.named_parameters(), *base.named_buffers()] if "prefix_memory" not in name}
    assert after.keys() == frozen.keys()
    assert [name for name in frozen if not torch.equal(after[name], frozen[name])] == []
    assert [name for name, p in base.named_parameters() if "prefix_memory" not in name and p.grad is not None] == []


def test_dropout_acts_in_training_only():
    plain = tiny.with_memory(tiny.build())
    dropped = tiny.with_memory(tiny.build(), dropout=0.5)  # randomize() gives both the same contents

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(input_ids=tiny.tokens(), use_cache=False).logits

    same_parameters(dropped, plain)
    close_logits(logits(dropped), logits(plain))
    plain.train()
    dropped.train()
    assert torch.equal(logits(plain), logits(plain))  # the base model itself has no randomness
    assert not torch.equal(logits(dropped), logits(dropped))
    close_logits(logits(dropped.eval()), logits(plain.eval()))
    assert torch.equal(logits(dropped), logits(dropped))


def test_dropout_keeps_the_expectation_of_the_read():
    memory = MatrixMemory(MemorySite(heads=2, kv_heads=2, head_dim=8, value_dim=4), rank=None, dropout=0.3)
    nn.init.normal_(memory.M)
    query = torch.randn(1, 2, 8)
    with torch.no_grad():
        expected = memory.eval()(query)[0]
        draws = memory.train()(query.expand(20_000, 2, 8))
    standard_error = draws.std(dim=0) / len(draws) ** 0.5
    assert (standard_error > 0).all()
    assert ((draws.mean(dim=0) - expected).abs() < 5 * standard_error).all()
    # the control: without the factor 1/(1-p) the mean would be far outside of that interval somewhere
    assert ((0.7 * draws.mean(dim=0) - expected).abs() > 5 * standard_error).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bfloat16_base_trains_with_an_fp32_adapter(variant):
    model = adapted_model("llama_gqa", dtype=torch.bfloat16, **VARIANTS[variant][0])
    memory = tiny.memory_parameters(model)
    assert {p.dtype for p in memory.values()} == {torch.float32}
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "prefix_memory" not in name}
    assert {p.dtype for p in base.values()} == {torch.bfloat16}

    optimizer = optimizer_of(model)
    before = snapshot(model)
    losses = [train_step(model, optimizer) for _ in range(10)]

    assert moved(model, before) == (set(memory), set())
    assert losses[-1] < losses[0] - 0.01
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    assert model(input_ids=tiny.tokens(), use_cache=False).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(("rank", "zero"), [(None, "M"), (16, "B")])
@pytest.mark.parametrize("feature_map", ["elu", "mlp"])
def test_a_memory_starts_at_zero_and_its_other_factors_at_their_documented_size(feature_map, rank, zero):
    site = MemorySite(heads=8, kv_heads=8, head_dim=64, value_dim=32)
    size = 48 if feature_map == "mlp" else None
    memory = MatrixMemory(site, rank=rank, feature_map=feature_map, feature_dim=size)
    starts = dict(memory.named_parameters())
    assert not starts.pop("mean").any()
    feature_dim = 48 if feature_map == "mlp" else 64
    assert not starts.pop(zero).any()
    assert not memory.matrix().any()
    assert memory.matrix().shape == (8, feature_dim, 32)
    expected_std = {"A": feature_dim**-0.5, "feature_map.W": 64**-0.5, "feature_map.b": 0.0}
    assert set(starts) <= set(expected_std)
    for name, start in starts.items():
        assert start.std().item() == pytest.approx(expected_std[name], rel=0.05), name
