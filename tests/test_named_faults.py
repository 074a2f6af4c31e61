"""Names, numbers and configs that mean nothing to a model are refused, and configs and models may be used again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

import tiny
from command_line import call
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError
from prefixmemory.training.card import model_card


def adapted(**fields: object) -> PeftModel:
    return get_peft_model(tiny.build(), PrefixMemoryConfig(task_type="CAUSAL_LM", **fields))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target_modules": ["self_attn", "typo"]}, "target_modules names 'typo'"),
        ({"exclude_modules": ["sefl_attn"]}, r"exclude_modules names 'sefl_attn'.*Did you mean 'self_attn'\?"),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save names 'lm_haed'"),
        ({"layers_to_transform": [0, 99]}, "layers_to_transform names layer 99.*there are 0, 1"),
        ({"layers_to_transform": 7}, "matches no attention"),
    ],
    ids=str,
)
def test_what_meets_nothing_is_refused(fields, said):
    with pytest.raises(PrefixMemoryError, match=said):
        adapted(**fields)


def test_what_meets_something_is_taken():
    """The control."""
    adapted(target_modules=["self_attn"], exclude_modules=["layers.1.self_attn"], modules_to_save=["lm_head"])
    adapted(layers_to_transform=[0, 1], target_modules=["self_attn"])
    adapted(layers_to_transform=1)
    adapted(modules_to_save=["head"])  # as in PEFT, the end of a name


def test_an_adapter_that_is_not_there_cannot_be_made_active():
    model = adapted()
    for names in ("defautl", ["default", "defautl"]):
        with pytest.raises(PrefixMemoryError, match=r"There is no adapter 'defautl'\. Did you mean 'default'\?"):
            model.base_model.set_adapter(names)
    model.base_model.set_adapter(["default"])


@pytest.mark.parametrize("first", [("--learning-rate", 1e-3), ("--set", "training.learning_rate=1e-3")])
def test_a_value_that_is_given_twice_is_refused(first):
    words = (
        "train",
        "--model",
        "m",
        "--data",
        "d.jsonl",
        "--output",
        "o",
        *first,
        "--set",
        "training.learning_rate=5e-3",
    )
    assert "training.learning_rate is given twice" in call(*words).refusal


@pytest.mark.parametrize("name", ["0", "layers", "self_attn", "mean", "A"])
def test_an_adapter_is_not_called_like_a_part_of_a_path(name):
    """PEFT would leave the tensors of others out of their files."""
    config = PrefixMemoryConfig(task_type="CAUSAL_LM")
    with pytest.raises(PrefixMemoryError, match=f"An adapter cannot be called '{name}'"):
        get_peft_model(tiny.build(), config, adapter_name=name)
    with pytest.raises(PrefixMemoryError, match=f"An adapter cannot be called '{name}'"):
        adapted().add_adapter(name, PrefixMemoryConfig(task_type="CAUSAL_LM"))


def test_one_config_serves_one_model_after_another(tmp_path):
    """What was found out for the first is nothing that the user said of the second."""
    config = PrefixMemoryConfig(task_type="CAUSAL_LM")
    first = get_peft_model(tiny.build(seed=0), config)
    first.save_pretrained(tmp_path / "first")
    second = get_peft_model(tiny.build("gpt2", seed=1), config)  # its attention has another name
    second.save_pretrained(tmp_path / "second")
    saved = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("first", "second")]
    assert saved[0]["base_model_fingerprint"] != saved[1]["base_model_fingerprint"]
    assert saved[0]["target_modules"] != saved[1]["target_modules"]
    PeftModel.from_pretrained(tiny.build(seed=0), tmp_path / "first")
    with pytest.raises(PrefixMemoryError, match="made for another base model"):  # what a file says still counts
        PeftModel.from_pretrained(tiny.build(seed=5), tmp_path / "first")
    chosen = PrefixMemoryConfig(task_type="CAUSAL_LM", target_modules=["self_attn"])
    get_peft_model(tiny.build(), chosen)
    with pytest.raises(PrefixMemoryError, match="target_modules"):  # and so does the user's word
        get_peft_model(tiny.build("gpt2"), chosen)


def test_a_config_that_is_given_to_from_pretrained_wins(tmp_path):
    tiny.with_memory(tiny.build()).save_pretrained(tmp_path)
    config = PrefixMemoryConfig.from_pretrained(tmp_path)
    config.scale, config.output_limit = 0.5, 0.25
    model = PeftModel.from_pretrained(tiny.build(), tmp_path, config=config)
    layer = next(module for module in model.modules() if hasattr(module, "prefix_memory_bank"))
    assert layer.scale["default"] == 0.5 and layer.configs["default"].output_limit == 0.25


def test_a_new_memory_in_a_model_in_use_draws_nothing():
    fields = {"rank": 4, "normalize": "none", "output_limit": 0.5, "dropout": 0.5}
    model = tiny.with_memory(tiny.build(), **fields)
    model.add_adapter("other", PrefixMemoryConfig(task_type="CAUSAL_LM", **fields))
    tiny.randomize(model, "other", seed=4)
    model.eval()
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    model.set_adapter("sum")
    with torch.no_grad():
        first, second = (model(input_ids=tiny.tokens()).logits for _ in range(2))
    assert torch.equal(first, second)
    model.train()
    assert not torch.equal(model(input_ids=tiny.tokens()).logits, model(input_ids=tiny.tokens()).logits)  # control


def test_a_pass_on_no_device_has_its_shapes():
    for fields in ({}, {"rank": None}):
        with torch.device("meta"):
            model = tiny.build()
        model = get_peft_model(model, PrefixMemoryConfig(task_type="CAUSAL_LM", normalize="none", **fields)).to("meta")
        ids = torch.zeros(2, 5, dtype=torch.long, device="meta")
        assert model(input_ids=ids).logits.shape == (2, 5, model.config.vocab_size)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "adds what its query reads from a small trained matrix, outside the softmax."),
        ({"feed_forward": 8}, "outside the softmax, and so do the projections of the feed-forward blocks."),
        ({"prefix_length": 4}, "adds what its query reads from trained prefix vectors"),
        ({"prefix_length": 4, "placement": "inside"}, "attends to trained prefix vectors too, inside the softmax."),
        ({"mixing": "head"}, "mixes its output with what its query reads from a small trained matrix"),
    ],
)
def test_a_card_says_what_this_memory_does(config: dict[str, object], said: str):
    assert said in model_card({"method": "prefix_memory", "config": config})


def test_a_card_without_a_config_stays_as_it_was(tmp_path: Path):
    assert "a small trained matrix" in model_card({"method": "prefix_memory"})
