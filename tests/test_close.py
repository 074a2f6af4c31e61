"""Negative controls of the comparisons in close.py: what they are to notice, they notice."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict

import tiny
from close import close_figures, close_logits, close_training, same_parameters

VARIANTS = {
    "paper": {},
    "default": tiny.DEFAULT,
    "kernel": {"similarity": "feature_map", "prefix_length": 3},
    "inside": {"placement": "inside", "prefix_length": 3},
}


def twins(variant: str, dtype: torch.dtype = torch.float32) -> tuple[PeftModel, PeftModel]:
    """Two models made alike."""
    one, other = (tiny.with_memory(tiny.build().to(dtype), **VARIANTS[variant]) for _ in range(2))
    return one, other


def change(model: PeftModel, amount: float = 1e-3) -> None:
    """One entry of one parameter, the last of the first layer's memory."""
    parameter = list(tiny.memory_parameters(model).values())[len(tiny.memory_parameters(model)) // 2 - 1]
    with torch.no_grad():
        parameter.view(-1)[-1] += amount


def logits(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.tokens(), use_cache=False).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_models_made_alike_are_the_same(variant):
    one, other = twins(variant)
    same_parameters(one, other)
    close_logits(logits(one), logits(other))


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_parameter_changed_by_a_thousandth_is_noticed_in_the_parameters(variant):
    one, other = twins(variant)
    change(one)
    with pytest.raises(AssertionError, match="prefix_memory_bank"):
        same_parameters(one, other)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_parameter_changed_by_a_thousandth_is_noticed_in_the_logits(variant):
    one, other = twins(variant)
    change(one)
    with pytest.raises(AssertionError, match="not close"):
        close_logits(logits(one), logits(other))


def test_the_last_bit_of_one_parameter_is_noticed():
    one, other = twins("paper")
    parameter = next(iter(tiny.memory_parameters(one).values())).data
    parameter.view(-1)[0] = parameter.view(-1)[0].nextafter(torch.tensor(2.0))
    with pytest.raises(AssertionError, match="prefix_memory_bank"):
        same_parameters(one, other)


@pytest.mark.parametrize("spoil", ["missing", "more", "dtype", "none"])
def test_other_tensors_are_noticed(spoil):
    state = get_peft_model_state_dict(twins("paper")[0])
    other = dict(state)
    name = next(iter(state))
    if spoil == "missing":
        del other[name]
    elif spoil == "more":
        other["more"] = state[name]
    elif spoil == "dtype":
        state[name] = state[name].round()  # the same numbers in both
        other[name] = state[name].double()
    else:
        state = other = {}
    with pytest.raises(AssertionError):
        same_parameters(state, other)


def test_a_loud_memory_is_noticed_in_bfloat16():
    one, other = twins("paper", torch.bfloat16)
    close_logits(logits(one), logits(other))
    tiny.randomize(one, seed=9)
    with pytest.raises(AssertionError, match="not close"):
        close_logits(logits(one), logits(other))


def test_values_that_are_no_numbers_are_close_to_nothing():
    nan = torch.tensor([1.0, float("nan")])
    for found, expected in ((nan, nan), (nan, torch.ones(2)), (torch.ones(2), nan)):
        with pytest.raises(AssertionError):
            close_logits(found, expected)


@pytest.mark.parametrize(
    "other",
    [
        {"score": 50.1, "answers": ["a", "b"], "rows": 2},
        {"score": 50.0, "answers": ["a", "c"], "rows": 2},
        {"score": 50.0, "answers": ["a"], "rows": 2},
        {"score": 50.0, "answers": ["a", "b"], "rows": 3},
        {"score": None, "answers": ["a", "b"], "rows": 2},
        {"score": 50.0, "answers": ["a", "b"]},
    ],
    ids=str,
)
def test_other_figures_are_noticed(other):
    expected = {"test": {"score": 50.0, "answers": ["a", "b"], "rows": 2}}
    close_figures({"test": {**expected["test"], "score": 50.0001}}, expected)
    with pytest.raises(AssertionError):
        close_figures({"test": other}, expected)


def test_a_training_that_went_another_way_is_noticed():
    expected = {"A": torch.full((2, 3), 1e-2)}
    close_training({"A": expected["A"] + 5e-7}, expected)
    for found in ({"A": expected["A"] + 1e-5}, {"B": expected["A"]}, {}):
        with pytest.raises(AssertionError):
            close_training(found, expected)
