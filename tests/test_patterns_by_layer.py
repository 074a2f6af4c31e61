"""Another rank, scale or limit for some layers, and tokens whose embeddings learn: fields that PEFT's users know."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

import tiny
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError
from prefixmemory.tuner.layers import memory_layers


def model(**fields: object) -> PeftModel:
    return tiny.with_memory(tiny.build(), **{**tiny.DEFAULT, **fields})


@torch.no_grad()
def logits(adapted: PeftModel) -> Tensor:
    return adapted(input_ids=tiny.tokens()).logits


@pytest.mark.parametrize("pattern", ["layers.1.self_attn", r"layers\.[1-9]\.self_attn", r".*1\.self_attn"])
def test_a_rank_for_some_layers(pattern, tmp_path):
    adapted = model(rank_pattern={pattern: 2})
    assert [layer.memory("default").rank for layer in memory_layers(adapted)] == [8, 2]
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path)
    assert [layer.memory("default").rank for layer in memory_layers(loaded)] == [8, 2]
    torch.testing.assert_close(logits(loaded), logits(adapted))


def test_a_memory_in_full_for_some_layers():
    assert [layer.memory("default").rank for layer in memory_layers(model(rank_pattern={"0.self_attn": None}))] == [
        None,
        8,
    ]


def test_a_scale_for_some_layers_is_set_scale_there():
    adapted, expected = model(scale_pattern={"layers.1.self_attn": 0.25}), model()
    memory_layers(expected)[1].set_scale("default", 0.25)
    assert torch.equal(logits(adapted), logits(expected))
    assert not torch.equal(logits(adapted), logits(model()))


def test_a_limit_for_some_layers():
    adapted = model(output_limit_pattern={"layers.0.self_attn": None})
    assert [layer.configs["default"].output_limit for layer in memory_layers(adapted)] == [None, 0.5]
    assert not torch.equal(logits(adapted), logits(model()))


def test_the_first_pattern_that_fits_counts():
    adapted = model(rank_pattern={"layers.0.self_attn": 2, "self_attn": 4})
    assert [layer.memory("default").rank for layer in memory_layers(adapted)] == [2, 4]


@pytest.mark.parametrize("name", ["rank", "scale", "output_limit"])
def test_a_pattern_that_fits_nothing_is_refused(name):
    with pytest.raises(PrefixMemoryError, match=rf"{name}_pattern=.*layers.7.self_attn.* fits no module"):
        model(**{f"{name}_pattern": {"layers.7.self_attn": 1 if name == "rank" else 1.0}})


def test_patterns_beside_targets_by_regular_expression():
    adapted = model(target_modules=r".*\.[01]\.self_attn", rank_pattern={"1.self_attn": 2})
    assert [layer.memory("default").rank for layer in memory_layers(adapted)] == [8, 2]


@pytest.mark.usefixtures("untyped")
def test_a_pattern_that_is_no_mapping_is_refused():
    with pytest.raises(PrefixMemoryError, match=r"rank_pattern=\[1\] is no mapping"):
        PrefixMemoryConfig(rank_pattern=[1])


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("name", "value"), [("rank", 0), ("scale", float("inf")), ("output_limit", -1.0)])
def test_a_value_that_the_field_refuses_is_refused_in_a_pattern(name, value):
    with pytest.raises(PrefixMemoryError, match=f"{name}="):
        model(**{f"{name}_pattern": {"layers.0.self_attn": value}})


def test_adapters_with_patterns_have_no_sum():
    adapted = model(rank_pattern={"layers.0.self_attn": 2})
    with pytest.raises(PrefixMemoryError, match="has a rank_pattern"):
        adapted.add_weighted_adapter(["default", "default"], [0.5, 0.5], "sum")


def test_tokens_that_are_named_learn_and_are_saved(tmp_path):
    adapted = get_peft_model(tiny.build(), PrefixMemoryConfig(task_type="CAUSAL_LM", trainable_token_indices=[9, 10]))
    before = adapted.get_input_embeddings()(torch.arange(20)).detach().clone()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    ids = torch.arange(3, 19)[None]
    adapted.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    after = adapted.eval().get_input_embeddings()(torch.arange(20)).detach()
    changed = (after != before).any(dim=-1).nonzero()[:, 0].tolist()
    assert changed == [9, 10]
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(adapted))
