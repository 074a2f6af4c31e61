"""PEFT's lifecycle on ten architectures, each with the default memory, a full one, a prefix inside the softmax, and
memories in feed-forward blocks too.

What PEFT asks of its own methods in ``tests/testing_common.py``, asked of memories. Other files look closer at one
architecture; this one sees that no architecture falls out of it.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from peft import (
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

import family_models
import tiny
from close import close_logits, same_parameters
from family_models import CASES, Case
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError
from prefixmemory.tuner.layers import attention_layers, memory_layers

# Old configs speak of their generation settings; the name that Trainer, TRL and most scripts call is deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:transformers", "ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]

DECODERS = ("llama", "gemma4", "gpt2", "gpt_neox", "opt", "bloom")
GENERATORS = (*DECODERS, "t5", "bart")
ARCHITECTURES = (*GENERATORS, "bert", "deberta-v2")
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "full": {"rank": None, "output_limit": None, "normalize": "none"},
    "inside": {"placement": "inside", "prefix_length": 3},
    "feed forward": {"feed_forward": 4},
}
#: Their attention function cannot be reached.
NOT_INSIDE = ("bloom", "deberta-v2")
CELLS = [(a, v) for a in ARCHITECTURES for v in VARIANTS if v != "inside" or a not in NOT_INSIDE]
everywhere = pytest.mark.parametrize(("architecture", "variant"), CELLS)
FIRST = {a: next(i for i, cell in enumerate(CELLS) if cell[0] == a) for a in ARCHITECTURES}
#: Where architecture and variant hardly meet: each architecture once, each variant several times.
DIAGONAL = [CELLS[FIRST[a] + n % (3 if a in NOT_INSIDE else 4)] for n, a in enumerate(ARCHITECTURES)]
once = pytest.mark.parametrize(("architecture", "variant"), DIAGONAL)
generators = pytest.mark.parametrize(("architecture", "variant"), [cell for cell in CELLS if cell[0] in GENERATORS])


def case_of(architecture: str) -> Case:
    """Its case with two layers and without dropout."""
    case = CASES[architecture]
    fields = dataclasses.fields(CONFIG_MAPPING[case.model_type])
    layers = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")
    more: dict[str, Any] = {f.name: 2 for f in fields if f.name in layers}
    more |= {f.name: 0.0 for f in fields if "drop" in f.name and isinstance(f.default, float)}
    return dataclasses.replace(case, config=case.config | more)


@cache
def _built(architecture: str) -> nn.Module:
    return family_models.build(case_of(architecture))


def base_model(architecture: str) -> Any:
    return copy.deepcopy(_built(architecture))


def batch(architecture: str, rows: int = 2) -> dict[str, Tensor]:
    text = {"input_ids": tiny.tokens(rows, 10), "attention_mask": torch.ones(rows, 10, dtype=torch.long)}
    return text | ({"decoder_input_ids": tiny.tokens(rows, 8, seed=4)} if architecture in ("t5", "bart") else {})


def config(architecture: str, variant: str, **fields: Any) -> PrefixMemoryConfig:
    task = {"t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM", "bert": "FEATURE_EXTRACTION"}
    task |= {"deberta-v2": "FEATURE_EXTRACTION"}
    return PrefixMemoryConfig(task_type=task.get(architecture, "CAUSAL_LM"), **VARIANTS[variant] | fields)


def adapted(architecture: str, variant: str, fill: bool = True, **fields: Any) -> PeftModel:
    model = get_peft_model(base_model(architecture), config(architecture, variant, **fields))
    if fill:
        tiny.randomize(model)
    return model.eval()


def add(model: PeftModel, name: str, architecture: str, variant: str) -> None:
    model.add_adapter(name, config(architecture, variant))
    tiny.randomize(model, name, seed=5)


def output_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    outputs = model(**inputs)
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


@torch.no_grad()
def outputs(model: nn.Module, architecture: str, **more: Any) -> Tensor:
    return output_of(model, batch(architecture) | more)


def different(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-3)


def backward(model: nn.Module, architecture: str) -> None:
    """Of a loss in which every output has a say of its own."""
    found = output_of(model, batch(architecture)).float()
    (found * torch.randn(found.shape, generator=torch.Generator().manual_seed(3))).mean().backward()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# Saving and loading


@everywhere
def test_what_is_saved_comes_back(architecture, variant, tmp_path):
    model = adapted(architecture, variant)
    model.save_pretrained(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    loaded = PeftModel.from_pretrained(base_model(architecture), tmp_path)
    same_parameters(loaded, model)
    close_logits(outputs(loaded, architecture), outputs(model, architecture))
    assert different(outputs(loaded, architecture), outputs(base_model(architecture), architecture))
    assert not loaded.training and loaded.peft_config["default"].inference_mode and not trained(loaded)


@once
def test_weights_may_be_pickled_but_not_beside_an_older_file(architecture, variant, tmp_path):
    model = adapted(architecture, variant)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    same_parameters(PeftModel.from_pretrained(base_model(architecture), tmp_path), model)
    model.save_pretrained(tmp_path)  # the safetensors file is read where both are
    tiny.randomize(model, seed=9)
    with pytest.raises(PrefixMemoryError, match="an older save, which would be loaded in its place"):
        model.save_pretrained(tmp_path, safe_serialization=False)


@everywhere
def test_the_named_parameters_alone_are_the_adapter(architecture, variant, tmp_path):
    model = adapted(architecture, variant)
    model.save_pretrained(tmp_path, state_dict=dict(model.named_parameters()))
    same_parameters(PeftModel.from_pretrained(base_model(architecture), tmp_path), model)


@pytest.mark.filterwarnings("ignore:Adapter name 'memory' should not be contained in the prefix")
@once
def test_each_adapter_is_saved_by_its_own_name(architecture, variant, tmp_path):
    """Also where one name is a part of another, or of the names of modules."""
    model = adapted(architecture, variant)
    others = ["default2", "other_default", "efaul", "bank", "memory"]
    for name in others:
        add(model, name, architecture, variant)
    model.save_pretrained(tmp_path, selected_adapters=["default", "efaul"])
    assert sorted(f.name for f in tmp_path.iterdir() if f.is_dir()) == ["efaul"]
    alone = adapted(architecture, variant)
    alone.save_pretrained(tmp_path / "alone")
    same_parameters(*(load_file(d / "adapter_model.safetensors") for d in (tmp_path, tmp_path / "alone")))
    tiny.randomize(alone, seed=5)
    alone.load_adapter(tmp_path / "efaul", "default")
    model.set_adapter("efaul")
    close_logits(outputs(alone, architecture), outputs(model, architecture))


@everywhere
def test_an_adapter_is_loaded_again_under_other_names(architecture, variant, tmp_path):
    model = adapted(architecture, variant)
    model.save_pretrained(tmp_path)
    expected = outputs(model, architecture)
    tiny.randomize(model, seed=9)
    for name in ("again", "yet-another"):
        assert model.load_adapter(tmp_path, name).missing_keys == []
        model.set_adapter(name)
        close_logits(outputs(model, architecture), expected)
    model.set_adapter("default")
    assert different(outputs(model, architecture), expected)


@once
def test_a_config_object_may_be_given_for_the_saved_one(architecture, variant, tmp_path):
    model = adapted(architecture, variant)
    model.save_pretrained(tmp_path)
    own = config(architecture, variant)
    loaded = PeftModel.from_pretrained(base_model(architecture), tmp_path, config=own)
    assert loaded.peft_config["default"] is own and own.inference_mode
    same_parameters(loaded, model)


@everywhere
def test_low_cpu_mem_usage_leaves_nothing_on_the_meta_device(architecture, variant, tmp_path):
    model = adapted(architecture, variant)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(architecture), tmp_path, low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    for name in ("default", "other"):
        loaded.set_adapter(name)
        close_logits(outputs(loaded, architecture), outputs(model, architecture))


@once
def test_the_base_models_tensors_can_be_taken_out_and_put_back(architecture, variant):
    before = {name: tensor.clone() for name, tensor in base_model(architecture).state_dict().items()}
    model = adapted(architecture, variant)
    expected = outputs(model, architecture)
    same_parameters(get_base_model_state_dict(model), before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prefix_memory" not in name:
                parameter.add_(0.1)
    assert different(outputs(model, architecture), expected)
    result = set_base_model_state_dict(model, before, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(outputs(model, architecture), expected)


# Adding, switching, taking away


@everywhere
def test_an_adapter_is_added_deleted_and_leaves_the_active_one_alone(architecture, variant):
    model = adapted(architecture, variant)
    alone = outputs(model, architecture)
    add(model, "other", architecture, variant)
    assert torch.equal(outputs(model, architecture), alone)
    model.delete_adapter("other")
    assert torch.equal(outputs(model, architecture), alone)
    assert not any(".other." in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="other"):
        model.delete_adapter("other")


@everywhere
def test_the_other_adapter_answers_when_the_active_one_is_deleted(architecture, variant):
    model = adapted(architecture, variant)
    alone = outputs(model, architecture)
    add(model, "other", architecture, variant)
    model.set_adapter("other")
    other = outputs(model, architecture)
    assert different(other, alone)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("default")
    assert torch.equal(outputs(model, architecture), other)


@everywhere
def test_disabled_and_unloaded_it_is_the_base_model(architecture, variant):
    base = base_model(architecture)
    expected = outputs(base, architecture)
    names = list(base.state_dict())
    model = get_peft_model(base, config(architecture, variant))
    tiny.randomize(model.eval())
    with model.disable_adapter():
        assert torch.equal(outputs(model, architecture), expected)
    assert different(outputs(model, architecture), expected)
    model.base_model.disable_adapter_layers()
    assert torch.equal(outputs(model, architecture), expected)
    model.base_model.enable_adapter_layers()
    unloaded = model.unload()
    assert unloaded is base and list(unloaded.state_dict()) == names
    assert torch.equal(outputs(unloaded, architecture), expected)


@once
def test_merging_is_refused_and_nothing_is_merged(architecture, variant):
    model = adapted(architecture, variant)
    before = outputs(model, architecture)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(PrefixMemoryError, match="cannot be merged"):
            merge()
    assert torch.equal(outputs(model, architecture), before)


@everywhere
def test_the_weighted_sum_is_both_at_once_or_refused(architecture, variant):
    unlimited = {"default": {"output_limit": None}, "feed forward": {"output_limit": None, "feed_forward_limit": None}}
    model = adapted(architecture, variant, **unlimited.get(variant, {}))
    model.add_adapter("other", model.peft_config["default"])
    tiny.randomize(model, "other", seed=5)
    means = zip(tiny.means(model).values(), tiny.means(model, "other").values(), strict=True)
    for mean, other in means:  # memories that subtract different means need not have a sum
        other.data.copy_(mean.data)
    model.base_model.set_adapter(["default", "other"])
    if variant == "inside":
        with pytest.raises(PrefixMemoryError, match="cannot be summed"):
            model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
        return
    both = outputs(model, architecture)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(outputs(model, architecture), both, rtol=0, atol=1e-4 * float(both.abs().max()))
    model.set_adapter("other")
    assert different(outputs(model, architecture), both)


@everywhere
def test_each_row_has_its_adapter(architecture, variant):
    model = adapted(architecture, variant)
    add(model, "other", architecture, variant)
    separate = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        separate[name] = outputs(model, architecture)
    with model.disable_adapter():
        separate["__base__"] = outputs(model, architecture)
    for names in (["other", "__base__"], ["default", "other"]):
        mixed = outputs(model, architecture, adapter_names=names)
        for row, name in enumerate(names):
            close_logits(mixed[row], separate[name][row], amplified=10)
            assert all(different(mixed[row], separate[o][row]) for o in separate if o != name)


@once
def test_it_says_what_it_holds(architecture, variant):
    model = adapted(architecture, variant)
    assert "PrefixMemoryLayer(" in repr(model) and f"heads={memory_layers(model)[0].site.heads}" in repr(model)
    assert len(attention_layers(model)) == (4 if architecture in ("t5", "bart") else 2)
    status = model.get_model_status()
    assert status.num_adapter_layers == len(memory_layers(model))
    assert status.trainable_params == sum(p.numel() for p in tiny.memory_parameters(model).values())


# Training


@everywhere
def test_a_step_moves_what_requires_a_gradient_and_nothing_else(architecture, variant):
    model = adapted(architecture, variant).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    backward(model, architecture)
    torch.optim.AdamW(trained(model).values(), lr=1e-2).step()
    assert trained(model).keys() == tiny.memory_parameters(model).keys()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained(model).keys()


@everywhere
def test_only_the_layers_that_are_asked_for_get_a_memory_and_learn(architecture, variant, tmp_path):
    model = adapted(architecture, variant, layers_to_transform=[1]).train()
    holders = [name for name, module in model.named_modules() if module in memory_layers(model)]
    assert len(attention_layers(model)) == (2 if architecture in ("t5", "bart") else 1)
    assert (len(holders) > len(attention_layers(model))) == (variant == "feed forward")
    assert all(".1." in name and ".0." not in name.replace(".layer.0.", ".") for name in holders)
    backward(model, architecture)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained(model).keys()
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(architecture), tmp_path)
    close_logits(outputs(loaded, architecture), outputs(model, architecture))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(("architecture", "variant"), [cell for cell in CELLS if cell[1] != "full"])
def test_gradient_checkpointing_gives_the_same_gradients(architecture, variant, use_reentrant):
    model = adapted(architecture, variant).train()
    backward(model, architecture)
    expected = {name: p.grad.clone() for name, p in trained(model).items()}
    assert all(gradient.any() for gradient in expected.values())
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    runs = [0]
    memory_layers(model)[0].site.module.register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    backward(model, architecture)
    assert runs == [2]
    for name, parameter in trained(model).items():
        size = float(expected[name].abs().max())
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-4 * size)


@once
def test_a_model_prepared_for_training_lets_gradients_in_at_its_embeddings(architecture, variant):
    base = prepare_model_for_kbit_training(base_model(architecture))
    assert not trained(base)
    model = get_peft_model(base, config(architecture, variant))
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(batch(architecture)["input_ids"]).requires_grad
    tiny.randomize(model.train())
    backward(model, architecture)
    assert {name for name, p in trained(model).items() if p.grad is None} == set()


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@everywhere
def test_on_a_base_of_half_precision_it_answers_as_in_full(architecture, variant, dtype):
    """To a few times the rounding of the base model itself."""
    base, half = base_model(architecture), base_model(architecture).to(dtype)
    plain = outputs(base, architecture)
    rounding = (outputs(half, architecture).float() - plain).norm()
    full, model = (get_peft_model(m, config(architecture, variant)).eval() for m in (base, half))
    for adapter in (full, model):
        tiny.randomize(adapter, std=0.1)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    expected, found = outputs(full, architecture), outputs(model, architecture)
    assert found.dtype == dtype
    assert (found.float() - expected).norm() < min(4 * rounding, 0.5 * (expected - plain).norm())


@once
def test_without_autocast_adapters_have_the_dtype_of_the_base(architecture, variant, tmp_path):
    base = base_model(architecture).to(torch.bfloat16)
    model = get_peft_model(base, config(architecture, variant), autocast_adapter_dtype=False).eval()
    model.add_adapter("added", config(architecture, variant), autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "loaded", autocast_adapter_dtype=False)
    for name in ("default", "added", "loaded"):
        found = tiny.memory_parameters(model, name) | tiny.means(model, name)
        assert found and {p.dtype for p in found.values()} == {torch.bfloat16}
    assert outputs(model, architecture).isfinite().all()


# Inputs


@once
@torch.no_grad()
def test_embeddings_may_be_given_for_ids(architecture, variant):
    model = adapted(architecture, variant)
    ids = batch(architecture)["input_ids"]
    embeddings = model.get_input_embeddings()(ids)
    given = {"input_ids": None, "inputs_embeds": embeddings}
    if architecture == "gemma4":  # every layer has embeddings of its own
        given["per_layer_inputs"] = model.get_base_model().model.get_per_layer_inputs(ids, embeddings)
    close_logits(outputs(model, architecture, **given), outputs(model, architecture))


@torch.no_grad()
def greedy(model: Any, inputs: dict[str, Tensor], made: Tensor, steps: int) -> Tensor:
    """The last tokens that whole passes would have made, each behind those before it."""
    growing = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    whole = {**inputs, growing: made[:, :-1], "use_cache": False}
    if growing == "input_ids":
        whole["attention_mask"] = torch.ones_like(made[:, :-1])
    scores = output_of(model, whole)[:, -steps:]
    scores[..., 2] = -torch.inf  # the end is held back
    return scores.argmax(-1)


def prompt(architecture: str, rows: int = 2) -> dict[str, Tensor]:
    """A batch to continue; a decoder beside an encoder begins with its start token."""
    inputs = batch(architecture, rows)
    if "decoder_input_ids" in inputs:
        inputs["decoder_input_ids"][:, 0] = case_of(architecture).config["decoder_start_token_id"]
    return inputs


@generators
def test_generate_continues_as_whole_passes_do(architecture, variant):
    model = adapted(architecture, variant)
    inputs = prompt(architecture)
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, eos_token_id=2, forced_eos_token_id=None)
    made = model.generate(**inputs, **options)
    assert torch.equal(made[:, -4:], greedy(model, inputs, made, 4))
    if architecture in DECODERS:  # PEFT takes no positional arguments for the others
        mask = inputs["attention_mask"]
        assert torch.equal(model.generate(inputs["input_ids"], attention_mask=mask, **options), made)


@pytest.mark.parametrize(("architecture", "variant"), [cell for cell in DIAGONAL if cell[0] in GENERATORS])
def test_beams_of_a_mixed_batch_are_those_of_each_row_alone(architecture, variant):
    model = adapted(architecture, variant)
    add(model, "other", architecture, variant)
    inputs = prompt(architecture, rows=3)
    options = dict(num_beams=3, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    names = ["other", "__base__", "default"]
    mixed = model.generate(**inputs, adapter_names=names, **options)
    for row, name in enumerate(names):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        model.set_adapter("default" if name == "__base__" else name)
        alone = model.generate(**one, **options) if name != "__base__" else disabled(model, one, options)
        assert torch.equal(mixed[row], alone[0]), name


def disabled(model: PeftModel, inputs: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    with model.disable_adapter():
        return model.generate(**inputs, **options)
