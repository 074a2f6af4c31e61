"""Files of an adapter: what is written, that its tensors come back bit for bit, what is refused and leaves no trace."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import tiny
from close import close_logits, same_parameters
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError
from prefixmemory.tuner.layers import memory_layers
from processes import run_python

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

VARIANTS: dict[str, dict[str, Any]] = {
    "default": tiny.DEFAULT,
    "full": {},
    "rank": {"rank": 2},
    "share_heads": {"share_heads": True},
    "mlp": {"feature_map": "mlp", "feature_dim": 5},
    "rotary": {"query": "rotary", "normalize": "none", "scale": 0.5},
    "one_layer": {"layers_to_transform": [1]},
    "limited": {"output_limit": 0.3},
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.tokens(), use_cache=False).logits


def different(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-3)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def saved(folder: Path, **fields: Any) -> Path:
    """A filled adapter on disk."""
    tiny.with_memory(tiny.build(), **fields).save_pretrained(folder)
    return folder


def other_adapter() -> PeftModel:
    """A model with an adapter of its own."""
    model = tiny.with_memory(tiny.build(), rank=3, fill=False)
    tiny.randomize(model, seed=8)
    return model


# What is written, and that it comes back


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_safetensors_json_and_the_model_card_are_written(variant, tmp_path):
    saved(tmp_path, **VARIANTS[variant])
    assert sorted(contents(tmp_path)) == ["README.md", CONFIG, WEIGHTS]
    json.loads((tmp_path / CONFIG).read_text())
    assert all(".prefix_memory.prefix_memory_bank." in key for key in load_file(tmp_path / WEIGHTS))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_parameters_of_a_saved_adapter_come_back_bit_for_bit(variant, tmp_path):
    model = tiny.with_memory(tiny.build(), **VARIANTS[variant])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path)
    assert different(logits(model), logits(tiny.build()))
    same_parameters(load_file(tmp_path / WEIGHTS), get_peft_model_state_dict(model))
    same_parameters(loaded, model)
    close_logits(logits(loaded), logits(model))
    for name in VARIANTS[variant]:
        assert getattr(loaded.peft_config["default"], name) == VARIANTS[variant][name]


def test_what_is_saved_again_is_what_was_loaded(tmp_path):
    saved(tmp_path / "first")
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_saving_over_an_older_save_replaces_it(tmp_path):
    model = tiny.with_memory(tiny.build())
    model.save_pretrained(tmp_path)
    tiny.randomize(model, seed=6)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path)
    same_parameters(loaded, model)
    close_logits(logits(loaded), logits(model))


@pytest.mark.parametrize(
    "fields", [{}, {"rank": None}, {"rank": 16}, {"feature_map": "mlp"}, {"share_heads": True}], ids=str
)
def test_the_weights_file_is_hardly_larger_than_its_tensors(fields, tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_config(config), PrefixMemoryConfig(**fields))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    means = [memory.mean for layer in memory_layers(model) for memory in layer.prefix_memory_bank.values()]
    assert size == 4 * sum(t.numel() for t in [*tiny.memory_parameters(model).values(), *means])
    assert size < (tmp_path / WEIGHTS).stat().st_size <= 1.05 * size


@pytest.mark.parametrize("is_trainable", [False, True])
def test_is_trainable_decides_whether_a_loaded_adapter_trains(is_trainable, tmp_path):
    saved(tmp_path)
    model = PeftModel.from_pretrained(tiny.build(), tmp_path, is_trainable=is_trainable)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == (set(tiny.memory_parameters(model)) if is_trainable else set())
    assert model.peft_config["default"].inference_mode is not is_trainable
    model.load_adapter(tmp_path, "second", is_trainable=is_trainable)
    trainable = {name for name, p in tiny.memory_parameters(model, "second").items() if p.requires_grad}
    assert trainable == (set(tiny.memory_parameters(model, "second")) if is_trainable else set())


def test_a_new_process_loads_base_model_and_adapter_by_the_adapter_alone(tmp_path):
    base = tiny.save_tiny(tmp_path / "base")
    model = tiny.with_memory(AutoModelForCausalLM.from_pretrained(base), query="rotary", rank=2)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["base_model_name_or_path"] == str(base)
    script = """
import sys, torch
import prefixmemory
from peft import AutoPeftModelForCausalLM, get_peft_model_state_dict
from safetensors.torch import save_file
ids = torch.tensor(eval(sys.argv[2]))
with torch.no_grad():
    model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1] + "/adapter")
    adapted = model(input_ids=ids, use_cache=False).logits
    with model.disable_adapter():
        base = model(input_ids=ids, use_cache=False).logits
save_file({"adapted": adapted, "base": base}, sys.argv[1] + "/logits.safetensors")
save_file(get_peft_model_state_dict(model), sys.argv[1] + "/loaded.safetensors")
"""
    run_python("-W", "error::UserWarning", "-c", script, tmp_path, tiny.tokens().tolist())
    answers = load_file(tmp_path / "logits.safetensors")
    same_parameters(load_file(tmp_path / "loaded.safetensors"), get_peft_model_state_dict(model))
    close_logits(answers["adapted"], logits(model))
    close_logits(answers["base"], logits(AutoModelForCausalLM.from_pretrained(base)))
    assert different(answers["adapted"], answers["base"])


# Refusals: each is a way to spoil the folder, and what the message must say


def rewrite_weights(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    """Spoil tensors, and pass the checksum: as a file that was made so, not damaged on its way."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        rewrite_config(lambda config: config.pop("weights_sha256"))(folder)

    return spoil


def rewrite_config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        change(config)
        (folder / CONFIG).write_text(json.dumps(config))

    return spoil


def set_field(name: str, value: Any) -> Callable[[Path], None]:
    return rewrite_config(lambda config: config.update({name: value}))


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def truncate_without_checksum(folder: Path) -> None:
    truncate(folder)
    rewrite_config(lambda config: config.pop("weights_sha256"))(folder)


def change_one_byte(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(data))


def remove_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def drop_first(tensors: dict[str, Tensor]) -> None:
    del tensors[min(tensors)]


def add_layer(tensors: dict[str, Tensor]) -> None:
    tensors[min(tensors).replace("layers.0", "layers.7")] = tensors[min(tensors)].clone()


def transpose_first(tensors: dict[str, Tensor]) -> None:
    tensors[min(tensors)] = tensors[min(tensors)][:, :7].contiguous()


SPOILED: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "missing_key": (
        rewrite_weights(drop_first),
        [
            "lacks 1 of its 2 memory tensors",
            "model.layers.0.self_attn.prefix_memory.prefix_memory_bank.M",
            "trained on",
        ],
    ),
    "extra_key": (
        rewrite_weights(add_layer),
        ["has unknown 1", "model.layers.7.self_attn.prefix_memory.prefix_memory_bank.M", "trained on"],
    ),
    "wrong_shape": (
        rewrite_weights(transpose_first),
        ["model.layers.0.self_attn.prefix_memory.prefix_memory_bank.M", "[4, 7, 8]", "[4, 8, 8]"],
    ),
    "truncated": (truncate, [WEIGHTS, "truncated or damaged", "Copy it again"]),
    "truncated_without_checksum": (truncate_without_checksum, [WEIGHTS, "truncated or damaged", "Copy it again"]),
    "one_byte_changed": (change_one_byte, [WEIGHTS, "not the file that was saved", "weights_sha256"]),
    "no_weights": (remove_weights, [WEIGHTS, "is missing", "Copy it"]),
    "unknown_field": (set_field("feature_mpa", "elu"), ["no field 'feature_mpa'", "Did you mean 'feature_map'?"]),
    "unknown_feature_map": (set_field("feature_map", "gelo"), ["feature_map='gelo'", "Did you mean 'gelu'?"]),
    "unknown_normalize": (set_field("normalize", "feature_l3"), ["normalize='feature_l3'", "mean 'feature_l2'?"]),
    "unknown_query": (set_field("query", "contents"), ["query='contents'", "Did you mean 'content'?"]),
    "other_base": (set_field("base_model_fingerprint", [0.1, -0.2] * 32), ["another base model", "=None"]),
}


@pytest.mark.parametrize("way", ["from_pretrained", "low_cpu_mem_usage"])
@pytest.mark.parametrize("case", SPOILED)
@pytest.mark.usefixtures("untyped")
def test_a_spoiled_adapter_is_refused_and_leaves_the_base_model_as_it_was(case, way, tmp_path):
    spoil, words = SPOILED[case]
    saved(tmp_path)
    spoil(tmp_path)
    files = contents(tmp_path)
    base = tiny.build()
    before = logits(base)
    keys = list(base.state_dict())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()]

    with pytest.raises(PrefixMemoryError) as refusal:
        PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=way == "low_cpu_mem_usage")

    assert [word for word in words if word not in str(refusal.value)] == []
    assert contents(tmp_path) == files
    assert list(base.state_dict()) == keys
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()] == hooks
    assert torch.equal(logits(base), before)
    # nothing of the refused adapter is in the way of a sound one: not even a warning, which would be an error here
    sound = PeftModel.from_pretrained(base, saved(tmp_path / "sound"))
    assert different(logits(sound), before)


@pytest.mark.parametrize("case", SPOILED)
@pytest.mark.usefixtures("untyped")
def test_a_spoiled_adapter_is_refused_and_leaves_other_adapters_as_they_were(case, tmp_path):
    spoil, words = SPOILED[case]
    saved(tmp_path)
    spoil(tmp_path)
    files = contents(tmp_path)
    model = other_adapter()
    before = logits(model)
    with model.disable_adapter():
        base = logits(model)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]

    with pytest.raises(PrefixMemoryError) as refusal:
        model.load_adapter(tmp_path, "spoiled")

    assert [word for word in words if word not in str(refusal.value)] == []
    assert contents(tmp_path) == files
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert torch.equal(logits(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.load_adapter(saved(tmp_path / "sound"), "spoiled")  # the name is free
    model.set_adapter("spoiled")
    assert different(logits(model), before)


KEY_FAULTS = ["missing_key", "extra_key", "wrong_shape"]


@pytest.mark.parametrize("case", KEY_FAULTS)
def test_a_spoiled_file_loaded_over_an_adapter_leaves_that_adapter_as_it_was(case, tmp_path):
    # load_adapter under a name that is taken replaces the weights; a refusal must not cost the user what is there
    spoil, words = SPOILED[case]
    model = tiny.with_memory(tiny.build())
    saved(tmp_path)
    spoil(tmp_path)
    tiny.randomize(model, seed=8)
    before = logits(model)
    with pytest.raises(PrefixMemoryError, match=re.escape(words[0])):
        model.load_adapter(tmp_path, "default")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), before)


def spoil_beside_head(folder: Path, case: str) -> str:
    """A spoiled adapter with a sound copy of the head; returns the words of the refusal."""
    spoil, words = SPOILED[case]
    saved(folder, modules_to_save=["lm_head"])
    tensors = load_file(folder / WEIGHTS)
    head = {key: tensors.pop(key) for key in list(tensors) if "lm_head" in key}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    spoil(folder)
    save_file({**load_file(folder / WEIGHTS), **head}, folder / WEIGHTS, metadata={"format": "pt"})
    return words[0]


@pytest.mark.parametrize("case", KEY_FAULTS)
def test_a_refused_adapter_takes_its_modules_to_save_with_it(case, tmp_path):
    words = spoil_beside_head(tmp_path, case)
    base = tiny.build()
    before, keys = logits(base), list(base.state_dict())
    with pytest.raises(PrefixMemoryError, match=re.escape(words)):
        PeftModel.from_pretrained(base, tmp_path)
    assert list(base.state_dict()) == keys
    assert torch.equal(logits(base), before)


@pytest.mark.parametrize("case", KEY_FAULTS)
def test_a_refused_adapter_leaves_the_modules_to_save_of_others(case, tmp_path):
    words = spoil_beside_head(tmp_path, case)
    model = tiny.with_memory(tiny.build(), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(-1.0)
    before, keys = logits(model), list(model.state_dict())
    with pytest.raises(PrefixMemoryError, match=re.escape(words)):
        model.load_adapter(tmp_path, "spoiled")
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), before)


# The wrong base model


def other_sizes() -> nn.Module:
    config = LlamaConfig(
        vocab_size=128, hidden_size=48, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


OTHER_MODELS: dict[str, Callable[[], nn.Module]] = {
    "other_weights": lambda: tiny.build(seed=1),
    "other_family": lambda: tiny.build("qwen2", seed=1),
    "other_sizes": other_sizes,
}


@pytest.mark.parametrize("other", OTHER_MODELS)
def test_an_adapter_of_another_base_model_is_refused(other, tmp_path):
    tiny.save_tiny(tmp_path / "base")
    made_for = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tiny.with_memory(made_for).save_pretrained(tmp_path / "adapter")
    files = contents(tmp_path)
    base = OTHER_MODELS[other]()
    before, keys = logits(base), list(base.state_dict())
    with pytest.raises(PrefixMemoryError, match="made for another base model") as refusal:
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert str(tmp_path / "base") in str(refusal.value)  # the model to load
    assert type(base).__name__ in str(refusal.value)
    assert "base_model_fingerprint=None" in str(refusal.value)  # the way around
    assert list(base.state_dict()) == keys
    assert torch.equal(logits(base), before)
    assert contents(tmp_path) == files
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")


def test_an_adapter_loads_onto_another_base_model_on_purpose(tmp_path):
    saved(tmp_path)
    config = PrefixMemoryConfig.from_pretrained(tmp_path)
    assert len(config.base_model_fingerprint) == 64
    config.base_model_fingerprint = None
    model = PeftModel.from_pretrained(tiny.build(seed=1), tmp_path, config=config)
    tensors = load_file(tmp_path / WEIGHTS)
    assert tensors.keys() == get_peft_model_state_dict(model).keys()
    assert all(torch.equal(tensors[key], tensor) for key, tensor in get_peft_model_state_dict(model).items())
    assert different(logits(model), logits(tiny.build(seed=1)))


def test_on_purpose_does_not_mean_into_another_shape(tmp_path):
    saved(tmp_path)
    config = PrefixMemoryConfig.from_pretrained(tmp_path)
    config.base_model_fingerprint = None
    base = other_sizes()
    before, keys = logits(base), list(base.state_dict())
    with pytest.raises(PrefixMemoryError, match=re.escape("[4, 8, 8], the model needs [4, 12, 12]")):
        PeftModel.from_pretrained(base, tmp_path, config=config)
    assert list(base.state_dict()) == keys
    assert torch.equal(logits(base), before)


@pytest.mark.parametrize("form", ["bfloat16", "tokens_added"])
def test_the_same_base_model_in_another_form_is_accepted(form, tmp_path):
    def base() -> nn.Module:
        torch.manual_seed(0)
        # a vocabulary larger than the rows that the fingerprint samples, as every real one is
        return AutoModelForCausalLM.from_config(
            LlamaConfig(
                vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
            )
        ).eval()

    tiny.with_memory(base()).save_pretrained(tmp_path)
    changed = base()
    if form == "bfloat16":
        changed = changed.to(torch.bfloat16)
    else:
        changed.resize_token_embeddings(640, mean_resizing=False)
    before = logits(changed)
    assert different(logits(PeftModel.from_pretrained(changed, tmp_path)), before)


def test_auto_classes_refuse_a_spoiled_adapter_too(tmp_path):
    base = tiny.save_tiny(tmp_path / "base")
    model = tiny.with_memory(AutoModelForCausalLM.from_pretrained(base))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    same_parameters(loaded, model)
    close_logits(logits(loaded), logits(model))
    change_one_byte(tmp_path / "adapter")
    with pytest.raises(PrefixMemoryError, match="not the file that was saved"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
