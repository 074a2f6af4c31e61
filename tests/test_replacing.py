"""An adapter loaded over another one of its name, by ``load_adapter`` or ``hotswap_adapter``: it takes its place in the
same tensors, or is refused and leaves it as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor

import tiny
from close import close_logits
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError

VARIANTS: dict[str, dict[str, Any]] = {
    "default": tiny.DEFAULT,
    "full": {},
    "trained map": {"feature_map": "mlp"},
    "inside": {"placement": "inside", "prefix_length": 3},
    "with a head": {"modules_to_save": ["lm_head"]},
}


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.tokens(), use_cache=False).logits


def by_load_adapter(model: PeftModel, folder: Path, name: str = "default") -> None:
    model.load_adapter(str(folder), name)


def by_hotswap(model: PeftModel, folder: Path, name: str = "default") -> None:
    hotswap_adapter(model, str(folder), adapter_name=name)


WAYS = [by_load_adapter, by_hotswap]


def saved(folder: Path, seed: int = 7, base_seed: int = 0, **fields: Any) -> PeftModel:
    """Another adapter, on disk."""
    model = tiny.with_memory(tiny.build(seed=base_seed), **fields)
    tiny.randomize(model, seed=seed)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.neg_()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("replace", WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_new_adapter_answers_from_the_tensors_of_the_old_one(variant, replace, tmp_path):
    other = saved(tmp_path, **VARIANTS[variant])
    model = tiny.with_memory(tiny.build(), **VARIANTS[variant])
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    before = logits(model)
    replace(model, tmp_path)
    close_logits(logits(model), logits(other))
    assert (logits(model) - before).abs().max() > 1e-3
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places


@pytest.mark.parametrize("replace", WAYS)
def test_an_adapter_that_is_not_active_is_replaced_by_its_own_config(replace, tmp_path):
    model = tiny.with_memory(tiny.build())
    model.add_adapter("second", PrefixMemoryConfig(task_type="CAUSAL_LM"))
    other = saved(tmp_path, **tiny.DEFAULT)
    before = logits(model)
    replace(model, tmp_path, "second")
    assert torch.equal(logits(model), before)
    model.set_adapter("second")
    close_logits(logits(model), logits(other))


def refused(model: PeftModel, replace: Callable[..., None], *args: Any, match: str) -> None:
    before = logits(model)
    with pytest.raises(PrefixMemoryError, match=match):
        replace(model, *args)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("replace", WAYS)
@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"feature_map": "gelu"}, "over the adapter 'default': feature_map is 'gelu' there and 'elu' here"),
        ({"rank": 2}, "rank is 2 there and None here"),
        ({"scale": 0.5}, "scale is 0.5 there and 1.0 here"),
        ({"head_scale": 0.5}, "head_scale is 0.5 there and 1.0 here"),
        ({"layers_to_transform": [0]}, "lacks 1 of its 2 memory tensors"),
        ({"base_seed": 3}, "was made for another base model"),
    ],
    ids=str,
)
def test_what_would_answer_otherwise_is_refused_with_the_difference(fields, match, replace, tmp_path):
    saved(tmp_path, **fields)
    refused(tiny.with_memory(tiny.build()), replace, tmp_path, match=match)


def test_hotswap_refuses_a_name_that_is_not_there(tmp_path):
    saved(tmp_path)
    refused(tiny.with_memory(tiny.build()), by_hotswap, tmp_path, "defualt", match="Did you mean 'default'")


def test_hotswap_refuses_a_damaged_file(tmp_path):
    saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused(tiny.with_memory(tiny.build()), by_hotswap, tmp_path, match="is not the file that was saved")


def test_hotswap_still_swaps_lora(tmp_path):
    def with_lora(seed: int) -> PeftModel:
        model = tiny.build()
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()

    other = with_lora(1)
    other.save_pretrained(tmp_path)
    model = with_lora(2)
    prepare_model_for_compiled_hotswap(model)
    before = logits(model)
    hotswap_adapter(model, str(tmp_path), adapter_name="default")
    close_logits(logits(model), logits(other))
    assert (logits(model) - before).abs().max() > 1e-3


def test_preparing_for_hotswap_is_said_to_be_needless():
    with pytest.raises(PrefixMemoryError, match="need no prepare_model_for_compiled_hotswap"):
        prepare_model_for_compiled_hotswap(tiny.with_memory(tiny.build()), target_rank=16)
