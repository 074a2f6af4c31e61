"""Adapter files whose tensors are no numbers to compute with, or no part of the adapter."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError
from prefixmemory.adapters.loading import load_adapter
from prefixmemory.memories.checkpoint import check_numbers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Tensors = dict[str, Tensor]


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


SPOILT: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "nan": (with_value(float("nan")), "holds NaN or infinities"),
    "inf": (with_value(float("inf")), "holds NaN or infinities"),
    "minus_inf": (with_value(float("-inf")), "holds NaN or infinities"),
    "half_inf": (lambda tensor: with_value(float("inf"))(tensor.half()), "holds NaN or infinities"),
    "float8_nan": (lambda tensor: with_value(float("nan"))(tensor).to(torch.float8_e4m3fn), "holds NaN or infinities"),
    "integer": (lambda tensor: tensor.to(torch.int32), "is of torch.int32"),
    "bool": (lambda tensor: tensor.to(torch.bool), "is of torch.bool"),
    "complex": (lambda tensor: tensor.to(torch.complex64), "is of torch.complex64"),
}
METHODS = {
    "memory": PrefixMemoryConfig(task_type="CAUSAL_LM"),
    "lora": LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """An adapter of a method on disk, its tensors changed, without the checksum that would refuse them."""

    def make(method: str, change: Callable[[Tensors], None] = lambda tensors: None) -> Path:
        model = get_peft_model(tiny.build(), copy.deepcopy(METHODS[method]))
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / WEIGHTS)
        change(tensors)
        save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
        config = json.loads((tmp_path / CONFIG).read_text())
        config.pop("weights_sha256", None)
        (tmp_path / CONFIG).write_text(json.dumps(config))
        return tmp_path

    return make


@pytest.mark.parametrize("method", METHODS)
def test_the_adapters_of_these_tests_load_unspoilt(adapter, method):
    assert isinstance(load_adapter(str(adapter(method))).model, PeftModel)


@pytest.mark.parametrize(
    ("method", "case"),
    [(method, case) for method in METHODS for case in SPOILT if (method, case) != ("lora", "complex")],  # PEFT's own
)
def test_a_tensor_that_holds_no_numbers_to_compute_with_is_refused_by_name(adapter, method, case):
    change, problem = SPOILT[case]
    names = []

    def spoil(tensors: Tensors) -> None:
        names.append(max(tensors))
        tensors[max(tensors)] = change(tensors[max(tensors)])

    folder = adapter(method, spoil)
    with pytest.raises(PrefixMemoryError) as refused:
        load_adapter(str(folder))
    assert problem in str(refused.value) and names[0].removeprefix("base_model.model.") in str(refused.value)


def test_nan_is_refused_in_a_state_dict_too_and_the_model_stays_as_it_was():
    model = tiny.with_memory(tiny.build())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {name: torch.full_like(p, torch.nan) for name, p in tiny.memory_parameters(model).items()}
    tensors = {name.replace(".default", ""): tensor for name, tensor in tensors.items()}
    with pytest.raises(PrefixMemoryError, match="holds NaN or infinities"):
        set_peft_model_state_dict(model, tensors)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["model.layers.0.mlp.gate_proj.weight", "model.embed_tokens.weight"])
def test_a_lora_that_would_replace_base_weights_is_refused(adapter, name):
    full = f"base_model.model.{name}"
    base = tiny.build().state_dict()[name]
    folder = adapter("lora", lambda tensors: tensors.update({full: torch.zeros_like(base)}))
    with pytest.raises(PrefixMemoryError, match=f"{full}.* would replace weights of the base model"):
        load_adapter(str(folder))


def test_a_lora_that_saves_a_module_in_full_loads(base, tmp_path):
    model = get_peft_model(tiny.build(), LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path)
    assert any("lm_head" in name for name in load_file(tmp_path / WEIGHTS))
    assert isinstance(load_adapter(str(tmp_path)).model, PeftModel)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(2, 2, device="meta"),
        torch.empty(0, 4),
        torch.arange(4),  # of no parameter that is expected: packed weights, indices
    ],
)
def test_what_has_no_values_here_is_not_looked_at(tensor):
    check_numbers({"a": tensor}, {"b": torch.zeros(2)})


def test_a_config_with_a_key_given_twice_is_refused(adapter):
    folder = adapter("memory")
    config = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text('{"peft_type": "LORA",' + config.lstrip()[1:])
    with pytest.raises(PrefixMemoryError, match=r"adapter_config\.json .*'peft_type' is given twice"):
        load_adapter(str(folder))
