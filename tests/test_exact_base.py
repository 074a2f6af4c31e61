"""The base model is sacred: whatever is not an enabled, filled memory leaves its logits bit-identical."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import prefixmemory
import tiny

FAMILIES = sorted(tiny.CONFIGS)
# Every way in which a read takes another path through the layer.
VARIANTS = {
    "default": tiny.DEFAULT,
    "content": {},
    "rotary": {"query": "rotary"},
    "rank": {"rank": 2},
    "share_heads": {"share_heads": True},
    "mlp": {"feature_map": "mlp"},
    "limited": {"output_limit": 0.3},
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.tokens(), use_cache=False).logits


def assert_changes(model: nn.Module, base: Tensor) -> None:
    """The negative control: were the memory not read at all, every check of equality would hold too."""
    assert (logits(model) - base).abs().max() > 1e-3


def hooks(model: nn.Module) -> dict[str, list[int]]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {name: [len(getattr(module, kind)) for kind in kinds] for name, module in model.named_modules()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_memory_leaves_the_logits_bit_identical(family, variant):
    model = tiny.build(family)
    base = logits(model)
    adapted = tiny.with_memory(model, fill=False, **VARIANTS[variant])
    assert torch.equal(logits(adapted), base)
    tiny.randomize(adapted)
    assert_changes(adapted, base)


@pytest.mark.parametrize("variant", ["default", "content", "rotary"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_disabled_memory_leaves_the_logits_bit_identical(family, variant):
    model = tiny.build(family)
    base = logits(model)
    adapted = tiny.with_memory(model, **VARIANTS[variant])
    assert_changes(adapted, base)

    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)
    assert_changes(adapted, base)  # the context manager switches it on again

    adapted.base_model.disable_adapter_layers()
    assert torch.equal(logits(adapted), base)
    adapted.base_model.enable_adapter_layers()
    assert_changes(adapted, base)


@pytest.mark.parametrize("variant", ["default", "content", "rotary"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scale_zero_leaves_the_logits_bit_identical(family, variant):
    model = tiny.build(family)
    base = logits(model)
    adapted = tiny.with_memory(model, scale=0.0, **VARIANTS[variant])
    assert torch.equal(logits(adapted), base)
    prefixmemory.set_scale(adapted, 1.0)
    assert_changes(adapted, base)
    prefixmemory.set_scale(adapted, 0.0)
    assert torch.equal(logits(adapted), base)


@pytest.mark.parametrize("variant", ["default", "content"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_deleted_memory_leaves_the_logits_bit_identical(family, variant):
    model = tiny.build(family)
    base = logits(model)
    adapted = tiny.with_memory(model, **VARIANTS[variant])
    assert_changes(adapted, base)
    adapted.delete_adapter("default")
    # through the base model: PEFT's own wrapper has no forward without any adapter, LoRA's neither
    assert torch.equal(logits(model), base)
    assert not [name for name, _ in adapted.named_parameters() if "prefix_memory_bank" in name]


@pytest.mark.parametrize("variant", ["default", "content", "rotary"])
@pytest.mark.parametrize("family", FAMILIES)
def test_unload_gives_back_the_base_model_as_it_was(family, variant):
    model = tiny.build(family)
    base = logits(model)
    names = [name for name, _ in model.named_modules()]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    hooks_before = hooks(model)

    adapted = tiny.with_memory(model, **VARIANTS[variant])
    assert_changes(adapted, base)
    assert hooks(model) != hooks_before  # the control of the comparison below
    unloaded = adapted.unload()

    assert unloaded is model
    assert torch.equal(logits(unloaded), base)
    assert [name for name, _ in unloaded.named_modules()] == names
    assert {name: set(vars(module)) for name, module in unloaded.named_modules()} == attributes
    assert hooks(unloaded) == hooks_before
    state = unloaded.state_dict()
    assert list(state) == list(tensors)
    assert all(torch.equal(state[key], tensors[key]) for key in tensors)
    # and it can be adapted again, without a warning about what was there before
    assert_changes(tiny.with_memory(unloaded, **VARIANTS[variant]), base)


@pytest.mark.parametrize(("variant", "tensors"), [("default", ("A", "B", "mean")), ("content", ("M",))])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_state_dict_of_the_base_model_only_gains_keys_of_the_memory(family, variant, tensors):
    model = tiny.build(family)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tiny.with_memory(model, **VARIANTS[variant])
    after = model.state_dict()
    assert [key for key in after if "prefix_memory" not in key] == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    layers = tiny.CONFIGS[family].num_hidden_layers
    extra = [key for key in after if "prefix_memory" in key]
    assert len(extra) == layers * len(tensors)
    ends = tuple(f".prefix_memory.prefix_memory_bank.default.{name}" for name in tensors)
    assert all(key.endswith(ends) for key in extra)
