"""The lifecycle of adapters, as PEFT users and transformers' own integration drive it."""

from __future__ import annotations

import copy
import importlib
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import prefixmemory
import prefixmemory.memories.peft_type
import tiny
from close import close_logits, same_parameters
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError, PrefixMemoryModel, register_feature_map
from prefixmemory.tuner.layers import memory_layers

# PEFT says so whenever the active adapter is deleted and another one takes its place.
ACTIVE_DELETED = "Adapter .* was active which is now deleted"


def logits(model: nn.Module, ids: Tensor | None = None, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.tokens() if ids is None else ids, use_cache=False, **kwargs).logits


def config(**fields: Any) -> PrefixMemoryConfig:
    """Of a memory in the paper's form but for ``fields``, as that of ``tiny.with_memory``."""
    return PrefixMemoryConfig(
        task_type="CAUSAL_LM", **{"rank": None, "output_limit": None, "normalize": "none", **fields}
    )


def add(model: PeftModel, name: str, seed: int, **fields: Any) -> None:
    model.add_adapter(name, config(**fields))
    tiny.randomize(model, name, seed=seed)


def two_adapters(
    first: dict[str, Any] | None = None, second: dict[str, Any] | None = None, base: nn.Module | None = None
) -> PeftModel:
    """A model with the filled adapters ``default`` (active) and ``other``."""
    model = tiny.with_memory(base or tiny.build(), **(first or {}))
    add(model, "other", seed=3, **(second or {}))
    return model.eval()


def adapter(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The tensors of one adapter by name, as they are saved."""
    return get_peft_model_state_dict(model, adapter_name=name)


def run_as(model: PeftModel, *names: str, ids: Tensor | None = None) -> Tensor:
    model.base_model.set_adapter(list(names))
    return logits(model, ids)


def different(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-3)


def bias(model: PeftModel, base_input: Tensor | None = None) -> Tensor:
    """What the output projection of layer 0 reads; less ``base_input``, what the memories added to it."""
    seen = []
    projection = model.base_model.model.model.layers[0].self_attn.o_proj
    handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model)
    handle.remove()
    return seen[0] if base_input is None else seen[0] - base_input


# Registration


def test_the_peft_type_is_a_member_of_the_enum_by_name_and_by_value():
    member = PeftType("PREFIX_MEMORY")
    assert member is PeftType.PREFIX_MEMORY is PeftType["PREFIX_MEMORY"]
    assert member in list(PeftType)
    assert (member.name, member.value, member) == ("PREFIX_MEMORY", "PREFIX_MEMORY", "PREFIX_MEMORY")
    assert PeftType("LORA") is PeftType.LORA  # the others are as they were
    assert PEFT_TYPE_TO_CONFIG_MAPPING["PREFIX_MEMORY"] is PrefixMemoryConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["PREFIX_MEMORY"] is PrefixMemoryModel


def test_registering_the_peft_type_twice_changes_nothing():
    members = list(PeftType)
    member = PeftType.PREFIX_MEMORY
    assert prefixmemory.memories.peft_type.add_peft_type("PREFIX_MEMORY") is member
    importlib.reload(prefixmemory.memories.peft_type)
    assert prefixmemory.memories.peft_type.PREFIX_MEMORY is member
    assert list(PeftType) == members


def test_importing_the_package_again_changes_nothing():
    # what a notebook does with %autoreload
    importlib.reload(prefixmemory)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["PREFIX_MEMORY"] is PrefixMemoryConfig
    assert different(logits(tiny.with_memory(tiny.build())), logits(tiny.build()))


# Create, add, switch, combine, disable, delete


def test_an_added_adapter_is_inactive_until_it_is_chosen():
    model = tiny.with_memory(tiny.build())
    alone = logits(model)
    add(model, "other", seed=3)
    assert torch.equal(logits(model), alone)
    model.set_adapter("other")
    switched = logits(model)
    assert different(switched, alone)
    assert model.active_adapters == ["other"]
    model.set_adapter("default")
    assert torch.equal(logits(model), alone)
    # and the second answers as it does alone
    lonely = tiny.with_memory(tiny.build(), fill=False)
    tiny.randomize(lonely, seed=3)
    same_parameters(adapter(model, "other"), adapter(lonely))
    close_logits(switched, logits(lonely))


def test_only_the_active_adapter_trains():
    model = two_adapters()
    for name in ("other", "default"):
        model.set_adapter(name)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(tiny.memory_parameters(model, name))


@pytest.mark.parametrize(
    "second",
    [
        {},
        tiny.DEFAULT,
        {"query": "rotary"},
        {"feature_map": "mlp"},
        {"rank": 2},
        {"share_heads": True},
        {"normalize": "query_rms"},
        {"output_limit": 0.3, "query": "rotary"},
    ],
    ids=str,
)
def test_memories_that_are_active_together_add(second):
    model = two_adapters(second=second)
    with model.disable_adapter():
        base = bias(model)
    model.base_model.set_adapter("default")
    first = bias(model, base)
    model.base_model.set_adapter("other")
    other = bias(model, base)
    assert first.abs().max() > 1e-2
    assert other.abs().max() > 1e-2
    assert different(first, other)
    model.base_model.set_adapter(["default", "other"])
    assert torch.allclose(bias(model, base), first + other, atol=1e-6)


def test_active_together_equals_the_weighted_sum_with_weights_one():
    model = two_adapters()
    together = run_as(model, "default", "other")
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    assert torch.allclose(run_as(model, "sum"), together, atol=1e-5)
    assert different(together, run_as(model, "default"))


def test_disabling_silences_every_active_adapter():
    model = tiny.build()
    base = logits(model)
    model = two_adapters(base=model)
    model.base_model.set_adapter(["default", "other"])
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert different(logits(model), base)


def test_deleting_an_inactive_adapter_leaves_the_active_one():
    model = two_adapters()
    before = logits(model)
    model.delete_adapter("other")
    assert torch.equal(logits(model), before)
    assert list(model.peft_config) == ["default"]
    assert tiny.memory_parameters(model, "other") == {}
    assert all("other" not in layer.scale for layer in memory_layers(model))


def test_deleting_the_active_adapter_activates_the_remaining_one():
    model = two_adapters()
    other = run_as(model, "other")
    model.set_adapter("default")
    with pytest.warns(UserWarning, match=ACTIVE_DELETED):
        model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(logits(model), other)
    assert tiny.memory_parameters(model, "default") == {}


def test_a_deleted_name_can_be_used_again():
    model = two_adapters()
    model.delete_adapter("other")
    add(model, "other", seed=5, rank=2)
    fresh = tiny.with_memory(tiny.build(), fill=False, rank=2)
    tiny.randomize(fresh, seed=5)
    same_parameters(adapter(model, "other"), adapter(fresh))
    close_logits(run_as(model, "other"), logits(fresh))


def test_an_adapter_reloads_under_another_name(tmp_path):
    model = two_adapters()
    expected = run_as(model, "other")
    model.save_pretrained(tmp_path)
    fresh = tiny.with_memory(tiny.build(), fill=False)
    fresh.load_adapter(tmp_path / "other", "renamed")
    same_parameters(adapter(fresh, "renamed"), adapter(model, "other"))
    close_logits(run_as(fresh, "renamed"), expected)
    assert list(fresh.peft_config) == ["default", "renamed"]


def test_adapters_on_different_layers_answer_each_on_its_own():
    model = two_adapters({"layers_to_transform": [0]}, {"layers_to_transform": [1]})
    base = logits(tiny.build())
    assert len(memory_layers(model)) == 2
    assert [list(layer.prefix_memory_bank) for layer in memory_layers(model)] == [["default"], ["other"]]
    first, other = run_as(model, "default"), run_as(model, "other")
    assert different(first, base)
    assert different(other, base)
    assert different(run_as(model, "default", "other"), first)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)


# add_weighted_adapter

SUMMABLE: dict[str, dict[str, Any]] = {
    "default": tiny.DEFAULT,
    "full": {},
    "rank": {"rank": 2},
    "share_heads": {"share_heads": True},
    "mlp": {"feature_map": "mlp"},
    "rotary": {"query": "rotary"},
    "scaled": {"scale": 0.37},
    "limited": {"output_limit": 0.3, "scale": 0.37},
    "mean": {"normalize": "feature_mean"},
}


def two_summable(first: dict[str, Any], second: dict[str, Any]) -> PeftModel:
    """As ``two_adapters``; trainable feature maps get equal weights, without which there is no sum."""
    model = two_adapters(first, second)
    for layer in memory_layers(model):
        layer.memory("other").feature_map.load_state_dict(layer.memory("default").feature_map.state_dict())
    return model


@pytest.mark.parametrize("variant", SUMMABLE)
def test_one_adapter_with_weight_one_is_that_adapter_bit_for_bit(variant):
    model = tiny.with_memory(tiny.build(), **SUMMABLE[variant])
    expected = logits(model)
    assert different(expected, logits(tiny.build()))
    model.add_weighted_adapter(["default"], [1.0], "copy")
    assert torch.equal(run_as(model, "copy"), expected)
    copied = tiny.memory_parameters(model, "copy")
    for name, parameter in tiny.memory_parameters(model).items():
        assert torch.equal(copied[name.replace(".default.", ".copy.")], parameter)


def test_one_adapter_with_weight_one_is_that_adapter_bit_for_bit_on_a_bfloat16_base():
    # the adapter is fp32 there; its copy must be too
    model = tiny.with_memory(tiny.build().to(torch.bfloat16))
    model.add_weighted_adapter(["default"], [1.0], "copy")
    copied = tiny.memory_parameters(model, "copy")
    for name, parameter in tiny.memory_parameters(model).items():
        assert parameter.dtype == torch.float32
        assert copied[name.replace(".default.", ".copy.")].dtype == torch.float32
        assert torch.equal(copied[name.replace(".default.", ".copy.")], parameter)


@pytest.mark.parametrize("variant", SUMMABLE)
def test_an_adapter_less_itself_is_the_base_model(variant):
    base = logits(tiny.build())
    model = tiny.with_memory(tiny.build(), **SUMMABLE[variant])
    model.add_weighted_adapter(["default", "default"], [1.0, -1.0], "nothing")
    assert torch.allclose(run_as(model, "nothing"), base, atol=1e-6)
    assert different(run_as(model, "default"), base)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {}),
        ({"scale": 0.5}, {"scale": 2.0}),
        ({"rank": 2}, {"rank": 3}),
        ({"rank": 2}, {}),
        ({"rank": 2, "scale": 0.5}, {"rank": 2}),
        ({"feature_map": "mlp"}, {"feature_map": "mlp"}),
        ({"share_heads": True}, {"share_heads": True, "rank": 1}),
    ],
    ids=str,
)
def test_the_weighted_adapter_adds_the_weighted_biases(first, second, tmp_path):
    model = two_summable(first, second)
    with model.disable_adapter():
        base = bias(model)
    model.base_model.set_adapter("default")
    a = bias(model, base)
    model.base_model.set_adapter("other")
    b = bias(model, base)
    model.add_weighted_adapter(["default", "other"], [0.7, -1.3], "mix")
    assert model.active_adapters == ["other"]  # as it was
    model.base_model.set_adapter("mix")
    assert torch.allclose(bias(model, base), 0.7 * a - 1.3 * b, atol=1e-5)
    assert different(bias(model, base), a)

    mixed = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path / "mix")
    same_parameters(adapter(loaded), adapter(model, "mix"))
    close_logits(logits(loaded), mixed)


def test_the_dose_set_at_run_time_counts_in_the_sum_and_in_its_saved_file(tmp_path):
    model = tiny.with_memory(tiny.build())
    prefixmemory.set_scale(model, 0.5)
    expected = logits(model)
    model.add_weighted_adapter(["default"], [1.0], "copy")
    assert torch.equal(run_as(model, "copy"), expected)
    model.save_pretrained(tmp_path, selected_adapters=["copy"])
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path / "copy")
    same_parameters(adapter(loaded), adapter(model, "copy"))
    close_logits(logits(loaded), expected)


def test_summing_ranks_adds_them():
    model = two_adapters({"rank": 2}, {"rank": 3})
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    assert model.peft_config["sum"].rank == 5
    assert {p.shape[-1] for n, p in tiny.memory_parameters(model, "sum").items() if n.endswith(".A")} == {5}


def test_adapters_can_be_summed_while_another_one_covers_more_layers():
    model = two_adapters({"layers_to_transform": [0]}, {"layers_to_transform": [0]})
    add(model, "everywhere", seed=4)
    expected = run_as(model, "default", "other")
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    assert torch.allclose(run_as(model, "sum"), expected, atol=1e-5)


def test_summing_does_not_change_which_parameters_train(tmp_path):
    two_adapters().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny.build(), tmp_path)  # for inference: nothing trains
    assert not [n for n, p in model.named_parameters() if p.requires_grad]
    model.add_weighted_adapter(["default"], [1.0], "copy")
    assert not [n for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ({}, {"feature_map": "gelu"}, "feature_map is 'elu' and 'gelu'"),
        ({"feature_map": "mlp"}, {"feature_map": "mlp"}, "their feature maps have different weights"),
        (
            {"feature_map": "mlp", "feature_dim": 4},
            {"feature_map": "mlp", "feature_dim": 6},
            "feature_dim is 4 and 6",
        ),
        ({}, {"normalize": "feature_l2"}, "normalize is 'none' and 'feature_l2'"),
        ({}, {"query": "rotary"}, "query is 'content' and 'rotary'"),
        ({}, {"share_heads": True}, "share_heads is False and True"),
        ({}, {"layers_to_transform": [0]}, "they adapt different layers"),
        ({}, {"output_limit": 0.3}, "output_limit is None and 0.3"),
        ({}, {"head_scale": 0.5}, "head_scale is 1.0 and 0.5"),
        ({"output_limit": 0.7, "rank": 2}, {"output_limit": 0.3, "rank": 2}, "output_limit is 0.7 and 0.3"),
    ],
    ids=str,
)
def test_adapters_that_read_different_features_are_not_summed(first, second, reason):
    model = two_adapters(first, second)
    before = run_as(model, "default", "other")
    with pytest.raises(PrefixMemoryError, match=re.escape(reason)) as refusal:
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    assert "'default' and 'other'" in str(refusal.value)
    assert "set_adapter([...])" in str(refusal.value)  # the way that works
    assert list(model.peft_config) == ["default", "other"]
    assert torch.equal(run_as(model, "default", "other"), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["default", "othr"], [1.0, 1.0], "sum"), "no adapter 'othr'. Did you mean 'other'?"),
        ((["default"], [1.0], "other"), "'other' is taken"),
        ((["default", "other"], [1.0], "sum"), "2 adapters and 1 weights"),
        (([], [], "sum"), "0 adapters and 0 weights"),
    ],
)
def test_a_sum_of_what_is_not_there_is_refused(arguments, message):
    model = two_adapters()
    before = logits(model)
    with pytest.raises(PrefixMemoryError, match=re.escape(message)):
        model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == ["default", "other"]
    assert torch.equal(logits(model), before)


def test_modules_saved_in_full_are_not_dropped_silently_from_a_sum():
    # a fresh copy of the base model's head is not the sum of two trained heads
    model = two_adapters({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]})
    with pytest.raises(PrefixMemoryError, match="modules_to_save"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")


# Injection into a model that PEFT does not wrap


@pytest.mark.parametrize(("fields", "tensors"), [({}, "M"), (tiny.DEFAULT, ("A", "B", "mean"))], ids=str)
def test_inject_adapter_in_model_round_trips_through_a_state_dict(fields, tensors):
    model = tiny.build()
    base = logits(model)
    model = inject_adapter_in_model(config(**fields), model)
    assert torch.equal(logits(model), base)
    tiny.randomize(model)
    expected = logits(model)
    assert different(expected, base)
    state = get_peft_model_state_dict(model)
    bank = "model.layers.{}.self_attn.prefix_memory.prefix_memory_bank.{}"
    assert sorted(state) == [bank.format(i, tensor) for i in (0, 1) for tensor in tensors]

    twin = inject_adapter_in_model(config(**fields), tiny.build(), adapter_name="twin")
    result = set_peft_model_state_dict(twin, state, adapter_name="twin")
    assert result.unexpected_keys == []
    same_parameters(adapter(twin, "twin"), adapter(model))
    close_logits(logits(twin), expected)


def test_a_state_dict_says_which_modules_are_injected():
    source = inject_adapter_in_model(config(layers_to_transform=[1]), tiny.build())
    tiny.randomize(source)
    state = get_peft_model_state_dict(source)

    model = tiny.build()
    with pytest.warns(RuntimeWarning, match="additional target modules: .'model.layers.0.self_attn'"):
        inject_adapter_in_model(config(), model, state_dict=state)
    assert [n for n, m in model.named_modules() if n.endswith(".prefix_memory")] == [
        "model.layers.1.self_attn.prefix_memory"
    ]
    set_peft_model_state_dict(model, state)
    same_parameters(model, source)
    close_logits(logits(model), logits(source))

    # and without a contradiction between config and state dict there is nothing to warn about
    full = inject_adapter_in_model(config(), tiny.build())
    again = inject_adapter_in_model(config(), tiny.build(), state_dict=get_peft_model_state_dict(full))
    assert len(memory_layers(again)) == 2


def test_transformers_own_integration_adds_switches_and_disables():
    model = tiny.build()
    base = logits(model)
    model.add_adapter(config(), adapter_name="first")
    tiny.randomize(model, "first")
    first = logits(model)
    # transformers' second add_adapter makes PEFT say that there is one already
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        model.add_adapter(config(rank=2), adapter_name="second")
    tiny.randomize(model, "second", seed=3)
    second = logits(model)
    assert different(first, base)
    assert different(second, first)

    model.set_adapter("first")
    assert torch.equal(logits(model), first)
    model.set_adapter(["first", "second"])
    assert different(logits(model), first)
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    model.delete_adapter("first")
    assert torch.equal(logits(model), second)


@pytest.mark.parametrize("fields", [{}, tiny.DEFAULT, {"rank": 2}, {"feature_map": "mlp"}], ids=str)
def test_transformers_own_integration_saves_and_loads(fields, tmp_path):
    model = tiny.build()
    model.add_adapter(config(**fields))
    tiny.randomize(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "generation_config.json"]

    fresh = tiny.build()
    info = fresh.load_adapter(tmp_path)
    assert not info.missing_keys
    assert not info.unexpected_keys
    for loaded in (fresh, PeftModel.from_pretrained(tiny.build(), tmp_path)):
        same_parameters(loaded, model)
        close_logits(logits(loaded), expected)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("spoil", ["lacks", "has unknown", "NaN", "shape"])
def test_transformers_own_integration_refuses_what_is_not_the_adapter(spoil, tmp_path):
    tiny.with_memory(tiny.build()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    if spoil == "lacks":
        del tensors[name]
    elif spoil == "has unknown":
        tensors[name.replace("layers.0", "layers.7")] = tensors[name].clone()
    elif spoil == "shape":
        tensors[name] = tensors[name][:, :4].clone()
    else:
        tensors[name].fill_(torch.nan)
    save_file(tensors, file)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "weights_sha256": None}))
    model, expected = tiny.build(), logits(tiny.build())
    with pytest.raises(
        RuntimeError if spoil == "shape" else PrefixMemoryError, match=None if spoil == "shape" else spoil
    ):
        model.load_adapter(tmp_path)
    assert not memory_layers(model) and torch.equal(logits(model), expected)
    whole = tiny.with_memory(tiny.build())
    whole.save_pretrained(tmp_path / "whole")
    model.load_adapter(tmp_path / "whole")
    close_logits(logits(model), logits(whole))
    assert not model.peft_config["default"].awaits_weights
    before = logits(model)
    with pytest.raises((RuntimeError, PrefixMemoryError)):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), before)
    assert not any(
        parameter.requires_grad for parameter in memory_layers(model)[0].parameters()
    )  # it was loaded to be used


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("around", ["LoRA", "torch.compile"])
def test_what_is_saved_does_not_depend_on_what_stands_around_the_base_model(around, tmp_path):
    model = tiny.with_memory(tiny.build(), **tiny.DEFAULT, feed_forward=4)
    model.save_pretrained(tmp_path / "plain")
    if around == "LoRA":
        inject_adapter_in_model(LoraConfig(target_modules=["up_proj", "down_proj"]), model.get_base_model(), "other")
    else:
        model.base_model.model = torch.compile(model.get_base_model(), backend="eager")
    model.save_pretrained(tmp_path / "around")
    plain, wrapped = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "around"))
    assert plain.keys() == wrapped.keys()
    assert all(torch.equal(tensor, wrapped[name]) for name, tensor in plain.items())
    PeftModel.from_pretrained(tiny.build(), tmp_path / "around")


def test_weights_are_not_loaded_over_an_adapter_of_a_config_that_was_read_from_another_file(tmp_path):
    tiny.with_memory(tiny.build()).save_pretrained(tmp_path / "a")
    other = tiny.with_memory(tiny.build(), feature_map="relu", scale=0.2)
    tiny.randomize(other, seed=7)
    other.save_pretrained(tmp_path / "b")
    model = get_peft_model(tiny.build(), PrefixMemoryConfig.from_pretrained(str(tmp_path / "a")))
    with pytest.raises(PrefixMemoryError, match="feature_map is 'relu' there and 'elu' here"):
        model.load_adapter(tmp_path / "b", "default")
    model.load_adapter(tmp_path / "a", "default")
    close_logits(logits(model), logits(PeftModel.from_pretrained(tiny.build(), tmp_path / "a")))


def test_sums_are_named_as_in_pefts_scripts():
    model = tiny.with_memory(tiny.build())
    model.add_weighted_adapter(["default"], [1.0], "copy", combination_type="linear")
    with pytest.raises(PrefixMemoryError, match=r"combination_type='svd' is not known\."):
        model.add_weighted_adapter(["default"], [1.0], "approximated", combination_type="svd")


def test_gradients_of_each_row_by_torch_func():
    """Functions with gradients of their own are left out there."""
    model, ids = tiny.with_memory(tiny.build(attention="eager"), **tiny.DEFAULT), tiny.tokens(2, 9)
    learns = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        given = {"input_ids": row[None], "labels": row[None], "use_cache": False}
        return torch.func.functional_call(model, parameters, (), given).loss

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(learns, ids)
    for number in range(2):
        model.zero_grad()
        model(input_ids=ids[number : number + 1], labels=ids[number : number + 1]).loss.backward()
        for name, gradients in found.items():
            torch.testing.assert_close(gradients[number], model.get_parameter(name).grad, atol=1e-6, rtol=1e-4)
            assert gradients[number].any()


def test_behind_the_active_adapter_all_layers_have_the_same():
    """PEFT lets each layer choose by itself."""
    model = get_peft_model(tiny.build(), config(), "a")
    for number, name in enumerate("bc"):
        model.add_adapter(name, config(layers_to_transform=[number]))
    for name in "abc":
        tiny.randomize(model, name)
    model.set_adapter("b")
    expected = logits(model)
    model.set_adapter("a")
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    assert torch.equal(logits(model), expected)
    model.base_model.set_adapter(["b", "c"])
    both = logits(model)
    model.delete_adapter("b")
    assert model.active_adapters == ["c"] and not torch.equal(logits(model), both)


def test_transformers_own_integration_saves_over_an_older_save(tmp_path):
    # it writes the config before the weights, so a checksum taken at that moment is that of the older weights
    model = tiny.build()
    model.add_adapter(config())
    tiny.randomize(model)
    model.save_pretrained(tmp_path)
    tiny.randomize(model, seed=9)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path)
    same_parameters(loaded, model)
    close_logits(logits(loaded), logits(model))


# A different adapter for each row of a batch

ROW_VARIANTS: list[dict[str, Any]] = [
    {},
    {"rank": 2},
    {"query": "rotary"},
    {"feature_map": "mlp", "feature_dim": 5},
    {"share_heads": True},
    {"scale": 0.5},
    tiny.DEFAULT,
    {"layers_to_transform": [1]},
    {"output_limit": 0.3, "query": "rotary"},
]


def many_adapters(count: int) -> tuple[PeftModel, list[str]]:
    model = tiny.with_memory(tiny.build(), fill=False)
    names = [f"user{i}" for i in range(count)]
    for i, name in enumerate(names):
        add(model, name, seed=10 + i, **ROW_VARIANTS[i % len(ROW_VARIANTS)])
    return model.eval(), names


def test_sixteen_adapters_in_one_batch_equal_sixteen_separate_runs():
    model, names = many_adapters(16)
    ids = tiny.tokens(rows=16)
    with model.disable_adapter():
        base = logits(model, ids)
    order = [names[(7 * i) % 16] for i in range(16)]
    mixed = logits(model, ids, adapter_names=order)
    for row, name in enumerate(order):
        alone = run_as(model, name, ids=ids[row : row + 1])
        assert torch.allclose(mixed[row], alone[0], atol=1e-5), name
        assert different(mixed[row], base[row]), name


def test_rows_of_the_base_model_and_repeated_names_may_be_mixed_in():
    model, names = many_adapters(3)
    ids = tiny.tokens(rows=6)
    with model.disable_adapter():
        base = logits(model, ids)
    order = [names[0], "__base__", names[2], names[0], "__base__", names[1]]
    mixed = logits(model, ids, adapter_names=order)
    assert torch.equal(mixed[[1, 4]], base[[1, 4]])
    for row in (0, 2, 3, 5):
        assert torch.allclose(mixed[row], run_as(model, order[row], ids=ids[row : row + 1])[0], atol=1e-5)
        assert different(mixed[row], base[row])
    assert torch.equal(logits(model, ids, adapter_names=["__base__"] * 6), base)


def test_after_a_mixed_batch_the_active_adapter_answers_again():
    model, names = many_adapters(2)
    model.set_adapter(names[0])
    before = logits(model)
    logits(model, adapter_names=["__base__", names[1]])
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_answers_each_row_with_its_own_adapter(beams):
    model, names = many_adapters(4)
    ids = tiny.tokens(rows=5)
    order = [names[1], "__base__", names[3], names[0], names[2]]
    options = dict(
        attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=beams
    )
    mixed = model.generate(input_ids=ids, adapter_names=order, **options)
    assert mixed.shape == (5, 14)
    with model.disable_adapter():
        base = model.generate(input_ids=ids, **options)
    options["attention_mask"] = torch.ones_like(ids[:1])
    for row, name in enumerate(order):
        if name == "__base__":
            assert torch.equal(mixed[row], base[row])
        else:
            model.set_adapter(name)
            assert torch.equal(mixed[row], model.generate(input_ids=ids[row : row + 1], **options)[0]), name
    assert sum(not torch.equal(m, b) for m, b in zip(mixed, base, strict=True)) >= 3  # the adapters do something


def test_adapter_names_are_refused_in_training_mode():
    model, names = many_adapters(2)
    model.train()
    with pytest.raises(PrefixMemoryError, match=re.escape("Call model.eval() first")):
        logits(model, adapter_names=names)
    model.eval()
    assert different(*logits(model, tiny.tokens()[[0, 0]], adapter_names=names))


def test_an_unknown_adapter_name_is_refused_with_the_nearest_one():
    model, names = many_adapters(2)
    before = logits(model)
    with pytest.raises(PrefixMemoryError, match=re.escape("'usr1', which is not loaded. Did you mean 'user1'?")):
        logits(model, adapter_names=[names[0], "usr1"])
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_adapter_names_must_be_one_a_row(count):
    # 1 and 2 divide the batch of 4: without beams they must not be spread over it
    model, names = many_adapters(2)
    with pytest.raises(PrefixMemoryError, match=f"adapter_names has {count} entries for a batch of 4 rows"):
        logits(model, tiny.tokens(rows=4), adapter_names=[names[i % 2] for i in range(count)])
    assert different(*logits(model, tiny.tokens()[[0, 0]], adapter_names=names))  # and the model still works


def test_modules_saved_in_full_follow_the_adapter_of_the_row():
    model = tiny.with_memory(tiny.build(), modules_to_save=["lm_head"])
    add(model, "other", seed=3, modules_to_save=["lm_head"])
    heads = model.base_model.model.lm_head.modules_to_save
    with torch.no_grad():
        heads["default"].weight.mul_(2.0)
        heads["other"].weight.mul_(-1.0)
    ids = tiny.tokens(rows=3)
    separate = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        separate[name] = logits(model, ids)
    with model.disable_adapter():
        separate["__base__"] = logits(model, ids)
    order = ["other", "__base__", "default"]
    mixed = logits(model, ids, adapter_names=order)
    for row, name in enumerate(order):
        assert torch.allclose(mixed[row], separate[name][row], atol=1e-5), name


# dtype, device, memory


@pytest.mark.parametrize("fields", [{"feature_map": "mlp", "rank": 2}, tiny.DEFAULT], ids=str)
def test_low_cpu_mem_usage_makes_the_memory_on_the_meta_device_and_loading_fills_it(fields, tmp_path):
    source = tiny.with_memory(tiny.build(), **fields)
    model = get_peft_model(tiny.build(), config(**fields), low_cpu_mem_usage=True)
    assert {p.device.type for p in tiny.memory_parameters(model).values()} == {"meta"}
    assert {p.device.type for p in tiny.build().parameters()} == {"cpu"}
    set_peft_model_state_dict(model, get_peft_model_state_dict(source), low_cpu_mem_usage=True)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    same_parameters(model, source)
    close_logits(logits(model.eval()), logits(source))

    source.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path, low_cpu_mem_usage=True)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    same_parameters(loaded, source)
    close_logits(logits(loaded), logits(source))
    loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    same_parameters(adapter(loaded, "second"), adapter(source))
    close_logits(run_as(loaded, "second"), logits(source))


@pytest.mark.parametrize("normalize", ["none", "feature_mean"])
@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_autocast_adapter_dtype_decides_the_dtype_of_the_memory_on_a_bfloat16_base(
    autocast, dtype, normalize, tmp_path
):
    def base() -> nn.Module:
        return tiny.build().to(torch.bfloat16)

    fields = config(feature_map="mlp", normalize=normalize)
    model = get_peft_model(base(), fields, autocast_adapter_dtype=autocast).eval()
    tiny.randomize(model)
    saved = get_peft_model_state_dict(model)
    assert len(saved) == (6 if normalize == "none" else 8)
    assert {tensor.dtype for tensor in saved.values()} == {dtype}
    assert logits(model).dtype == torch.bfloat16
    assert different(logits(model), logits(base()))

    model.add_adapter("other", config(), autocast_adapter_dtype=autocast)
    assert {p.dtype for p in tiny.memory_parameters(model, "other").values()} == {dtype}

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, autocast_adapter_dtype=autocast)
    assert {tensor.dtype for tensor in get_peft_model_state_dict(loaded).values()} == {dtype}
    same_parameters(adapter(loaded), adapter(model))
    close_logits(logits(loaded), logits(model))


# Modules saved in full


def test_modules_to_save_train_and_are_saved(tmp_path):
    base = tiny.build()
    untouched = logits(base)
    model = get_peft_model(base, config(modules_to_save=["lm_head"]))
    head = base.lm_head
    start = head.original_module.weight.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = tiny.tokens()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    model.eval()
    trained = head.modules_to_save["default"].weight
    assert different(trained, start)
    assert torch.equal(head.original_module.weight, start)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path)
    assert torch.equal(loaded.base_model.model.lm_head.modules_to_save["default"].weight, trained)
    same_parameters(loaded, model)
    close_logits(logits(loaded), logits(model))
    with loaded.disable_adapter():
        disabled = logits(loaded)
    close_logits(disabled, untouched)
    assert torch.equal(logits(loaded.unload()), disabled)
    same_parameters(loaded.base_model.model, tiny.build())
    with model.disable_adapter():
        assert torch.equal(logits(model), untouched)
    assert torch.equal(logits(model.unload()), untouched)


# Swap, unload, merge, copy


@pytest.mark.parametrize("fields", [{}, tiny.DEFAULT], ids=str)
def test_weights_can_be_swapped_into_a_loaded_adapter(fields):
    model = two_adapters(fields, fields)
    swapped_in = get_peft_model_state_dict(model, adapter_name="other")
    expected = run_as(model, "other")
    model.set_adapter("default")
    before = logits(model)
    set_peft_model_state_dict(model, swapped_in, adapter_name="default")
    assert torch.equal(logits(model), expected)
    assert different(before, expected)


def test_a_refused_swap_leaves_the_loaded_adapter_as_it_was():
    model = two_adapters()
    before = logits(model)
    state = get_peft_model_state_dict(model, adapter_name="other")
    broken = {key.replace(".M", ".N"): tensor for key, tensor in state.items()}
    with pytest.raises(PrefixMemoryError, match="lacks 2 of its 2 memory tensors"):
        set_peft_model_state_dict(model, broken, adapter_name="default")
    assert list(model.peft_config) == ["default", "other"]
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter", "unmerge_adapter"])
def test_merging_is_refused_with_the_reason(method):
    model = tiny.with_memory(tiny.build())
    before = logits(model)
    with pytest.raises(PrefixMemoryError, match=r"cannot be merged into the base weights.*φ is not linear.*unload\(\)"):
        getattr(model, method)()
    assert torch.equal(logits(model), before)
    assert model.get_model_status().merged_adapters == []


def test_unload_with_several_adapters_gives_the_base_model():
    base = tiny.build()
    expected, tensors = logits(base), {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model = two_adapters(second={"query": "rotary", "modules_to_save": ["lm_head"]}, base=base)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), expected)
    assert list(unloaded.state_dict()) == list(tensors)
    same_parameters(unloaded, tensors)


@pytest.mark.parametrize("fields", [{}, {"query": "rotary"}, tiny.DEFAULT], ids=str)
def test_a_deep_copy_is_independent_of_the_original(fields):
    base = tiny.build()
    untouched = logits(base)
    model = tiny.with_memory(base, **fields)
    before = logits(model)
    twin = copy.deepcopy(model)
    same_parameters(twin, model)
    close_logits(logits(twin), before)

    tiny.randomize(twin, seed=7)
    assert different(logits(twin), before)
    assert torch.equal(logits(model), before)

    own = set(map(id, twin.modules()))
    assert all(id(layer.site.module) in own and id(layer.site.query_source) in own for layer in memory_layers(twin))
    close_logits(logits(twin.unload()), untouched)
    assert torch.equal(logits(model), before)
    model.unload()
    assert torch.equal(logits(base), untouched)
    same_parameters(twin.base_model.model, base)


# What PEFT reports


def test_peft_reports_layers_adapters_and_trainable_parameters(capsys):
    model = two_adapters()
    base_count = sum(p.numel() for p in tiny.build().parameters())
    memory_count = 2 * 4 * 8 * 8  # layers x heads x feature_dim x head_dim
    status = model.get_model_status()
    assert status.base_model_type == "LlamaForCausalLM"
    assert status.adapter_model_type == "PrefixMemoryModel"
    assert status.peft_types == {"default": "PREFIX_MEMORY", "other": "PREFIX_MEMORY"}
    assert (status.trainable_params, status.total_params) == (memory_count, base_count + 2 * memory_count)
    assert (status.num_adapter_layers, status.enabled, status.active_adapters) == (2, True, ["default"])
    assert status.merged_adapters == []

    layers = model.get_layer_status()
    assert [layer.name for layer in layers] == [f"model.model.layers.{i}.self_attn.prefix_memory" for i in (0, 1)]
    assert {tuple(layer.available_adapters) for layer in layers} == {("default", "other")}
    assert {str(layer.requires_grad) for layer in layers} == {"{'default': True, 'other': False}"}
    assert {str(layer.devices) for layer in layers} == {"{'default': ['cpu'], 'other': ['cpu']}"}

    model.print_trainable_parameters()
    assert (
        f"trainable params: {memory_count:,d} || all params: {base_count + 2 * memory_count:,d}"
        in capsys.readouterr().out
    )
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


# Scale


@pytest.mark.parametrize("fields", [{}, tiny.DEFAULT], ids=str)
def test_set_scale_is_a_factor_on_the_answer(fields):
    model = two_adapters(fields, fields)
    with model.disable_adapter():
        base = bias(model)
    full = bias(model, base)
    assert full.abs().max() > 1e-2
    prefixmemory.set_scale(model, 0.25)
    assert torch.allclose(bias(model, base), 0.25 * full, atol=1e-6)
    model.set_scale(-1.0, "default")  # the same, as a method
    assert torch.allclose(bias(model, base), -full, atol=1e-6)
    assert {layer.scale["other"] for layer in memory_layers(model)} == {1.0}  # not active: left alone
    prefixmemory.set_scale(model, 3.0, "other")
    assert {layer.scale["other"] for layer in memory_layers(model)} == {3.0}


def test_set_scale_refuses_an_unknown_adapter():
    model = two_adapters()
    with pytest.raises(PrefixMemoryError, match=re.escape("no memory called 'othr'; there are: ['default', 'other']")):
        prefixmemory.set_scale(model, 0.5, "othr")
    assert {scale for layer in memory_layers(model) for scale in layer.scale.values()} == {1.0}


# Which layers


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("llama_gqa", {}, ["model.layers.0.self_attn", "model.layers.1.self_attn"]),
        ("llama_gqa", {"layers_to_transform": 1}, ["model.layers.1.self_attn"]),
        ("llama_gqa", {"layers_to_transform": [0]}, ["model.layers.0.self_attn"]),
        ("llama_gqa", {"layers_to_transform": [0], "layers_pattern": "layers"}, ["model.layers.0.self_attn"]),
        ("gpt2", {"layers_to_transform": [1]}, ["transformer.h.1.attn"]),
        ("llama_gqa", {"target_modules": ["self_attn"]}, ["model.layers.0.self_attn", "model.layers.1.self_attn"]),
        ("llama_gqa", {"target_modules": ["layers.1.self_attn"]}, ["model.layers.1.self_attn"]),
        ("llama_gqa", {"target_modules": r"model\.layers\.0\.self_attn"}, ["model.layers.0.self_attn"]),
        ("llama_gqa", {"target_modules": r".*\.self_attn"}, ["model.layers.0.self_attn", "model.layers.1.self_attn"]),
        ("llama_gqa", {"exclude_modules": ["layers.0.self_attn"]}, ["model.layers.1.self_attn"]),
        ("llama_gqa", {"exclude_modules": r".*\.1\..*"}, ["model.layers.0.self_attn"]),
        ("gpt_neox", {}, ["gpt_neox.layers.0.attention", "gpt_neox.layers.1.attention"]),
    ],
    ids=str,
)
def test_the_config_says_which_attention_modules_get_a_memory(family, fields, expected, tmp_path):
    base = tiny.build(family)
    model = tiny.with_memory(base, **fields)
    found = [n.removesuffix(".prefix_memory") for n, m in base.named_modules() if n.endswith(".prefix_memory")]
    assert found == expected
    assert different(logits(model), logits(tiny.build(family)))
    # the same modules again: by a saved config, and by a second adapter
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build(family), tmp_path)
    same_parameters(loaded, model)
    close_logits(logits(loaded), logits(model))
    model.add_adapter("second", config(**fields))
    assert len(tiny.memory_parameters(model, "second")) == len(expected)


# Feature maps of the user


class Shifted(nn.Module):
    """A feature map with a parameter, of twice the head's size."""

    def __init__(self, groups: int, head_dim: int, feature_dim: int | None) -> None:
        super().__init__()
        self.feature_dim = 2 * head_dim
        self.shift = nn.Parameter(torch.zeros(groups, head_dim))

    def forward(self, q: Tensor) -> Tensor:
        return torch.cat([q + self.shift[:, None, :], -q], dim=-1)


def cosine(q: Tensor) -> Tensor:
    return torch.cos(q)


def shifted_by_hand(q: Tensor, shift: Tensor) -> Tensor:
    return torch.cat([q + shift, -q], dim=-1)


@pytest.mark.parametrize("factory", [cosine, Shifted])
@pytest.mark.usefixtures("feature_map_names")
def test_a_registered_feature_map_is_the_one_that_is_read(factory: Callable[..., Any], tmp_path):
    register_feature_map("mine")(factory)
    model = tiny.with_memory(tiny.build(), feature_map="mine", normalize="none")
    attention = model.base_model.model.model.layers[0].self_attn
    queries = []
    handle = attention.q_proj.register_forward_hook(lambda module, args, output: queries.append(output))
    with model.disable_adapter():
        base = bias(model)
    handle.remove()

    q = queries[0].unflatten(-1, (4, 8))
    memory = attention.prefix_memory.memory("default")
    features = cosine(q) if factory is cosine else shifted_by_hand(q, memory.feature_map.shift)
    expected = torch.einsum("bthf,hfv->bthv", features, memory.M).flatten(-2)
    assert torch.allclose(bias(model, base), expected, atol=1e-5)
    assert expected.abs().max() > 0.1

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path)
    same_parameters(loaded, model)
    close_logits(logits(loaded), logits(model))


@pytest.mark.usefixtures("feature_map_names")
def test_a_parameter_of_a_registered_feature_map_learns():
    register_feature_map("mine")(Shifted)
    model = tiny.with_memory(tiny.build(), feature_map="mine")
    ids = tiny.tokens()
    model.train()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    shifts = {n: p for n, p in tiny.memory_parameters(model).items() if n.endswith(".shift")}
    assert len(shifts) == 2
    assert all(p.grad.abs().amax(dim=1).gt(0).all() for p in shifts.values())  # every head's
