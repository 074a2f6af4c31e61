"""What people who know PEFT expect: names below wrappers, configs of newer versions, kinds of errors, rows."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, NoMatchingPeftModuleError, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny
from close import close_logits, same_parameters
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.tokens(), use_cache=False).logits


class Wrapped(nn.Module):
    """As DDP names what it wraps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.config = module.config

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.module(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.module.get_input_embeddings()


def plain(base: nn.Module) -> nn.Module:
    return base


WRAPPERS = {"plain": plain, "compiled": lambda base: torch.compile(base, backend="eager"), "module": Wrapped}


@pytest.mark.parametrize("there", WRAPPERS)
@pytest.mark.parametrize("here", WRAPPERS)
def test_an_adapter_saved_from_a_wrapped_base_loads_on_a_bare_one_and_the_other_way_round(here, there, tmp_path):
    config = PrefixMemoryConfig(target_modules=["self_attn"])
    saved = get_peft_model(WRAPPERS[here](tiny.build()), config)
    tiny.randomize(saved)
    saved.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(WRAPPERS[there](tiny.build()), tmp_path)
    ours = {name.rpartition("layers.")[2]: p for name, p in saved.named_parameters() if "prefix_memory" in name}
    theirs = {name.rpartition("layers.")[2]: p for name, p in loaded.named_parameters() if "prefix_memory" in name}
    assert ours.keys() == theirs.keys() and len(ours) == 6
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_a_lora_that_is_merged_below_a_memory_leaves_no_trace_in_its_keys(tmp_path):
    lora = get_peft_model(tiny.build(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    merged = copy.deepcopy(lora).merge_and_unload()
    below = get_peft_model(lora, PrefixMemoryConfig(target_modules=["self_attn"]))
    tiny.randomize(below)
    below.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(merged, tmp_path)
    close_logits(logits(loaded), logits(below))


@pytest.mark.parametrize("name", ["model.layers.0.mlp.gate_proj.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_a_tensor_of_the_base_model_in_an_adapter_file_is_refused(name, tmp_path):
    tiny.with_memory(tiny.build()).save_pretrained(tmp_path)
    file = tmp_path / SAFETENSORS_WEIGHTS_NAME
    base = tiny.build()
    changed = base.state_dict()[name] + 1
    save_file({**load_file(file), f"base_model.model.{name}": changed}, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "weights_sha256": None}))
    before = logits(base)
    with pytest.raises(PrefixMemoryError, match=f"has unknown 1 of its 2 memory tensors, '{name}'"):
        PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(base), before)


def test_another_config_under_a_taken_name_is_refused_with_the_difference(tmp_path):
    tiny.with_memory(tiny.build(), feature_map="gelu").save_pretrained(tmp_path / "gelu")
    tiny.with_memory(tiny.build()).save_pretrained(tmp_path / "elu")
    model = tiny.with_memory(tiny.build())
    before = logits(model)
    with pytest.raises(PrefixMemoryError, match="over the adapter 'default': feature_map is 'gelu' there and 'elu'"):
        model.load_adapter(tmp_path / "gelu", "default")
    assert torch.equal(logits(model), before)
    model.load_adapter(tmp_path / "gelu", "another")
    tiny.randomize(model, seed=9)
    assert not torch.equal(logits(model), before)
    model.load_adapter(tmp_path / "elu", "default")  # the same config: its weights come back
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=1e-5)


def saved_with(folder: Path, **fields: object) -> Path:
    tiny.with_memory(tiny.build()).save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


def test_a_field_that_a_newer_peft_wrote_is_dropped_with_a_warning(tmp_path):
    saved_with(tmp_path, peft_version="99.0", telemetry_budget=3)
    with pytest.warns(UserWarning, match="telemetry_budget"):
        loaded = PeftModel.from_pretrained(tiny.build(), tmp_path)
    same_parameters(loaded, tiny.with_memory(tiny.build()))


@pytest.mark.parametrize(
    "fields",
    [
        {"telemetry_budget": 3},  # this PEFT has no such field
        {"peft_version": "99.0", "feature_mpa": "gelu"},  # a typo of ours
        {"peft_version": "99.0", "prefixmemory_version": "99.0", "telemetry_budget": 3},  # it may change the output
    ],
    ids=str,
)
def test_an_unknown_field_that_may_be_ours_is_refused(fields, tmp_path):
    saved_with(tmp_path, **fields)
    with warnings.catch_warnings(), pytest.raises(PrefixMemoryError, match="has no field"):
        PeftModel.from_pretrained(tiny.build(), tmp_path)


def test_errors_are_of_the_kinds_that_peft_and_python_raise():
    with pytest.raises(TypeError, match="has no field 'r'"):
        PrefixMemoryConfig(r=8)
    with pytest.raises(NoMatchingPeftModuleError, match="matches no attention module"):
        get_peft_model(tiny.build(), PrefixMemoryConfig(target_modules=["nothing"]))


@pytest.mark.parametrize("pattern", [[], ""])
def test_an_empty_layers_pattern_means_none(pattern):
    assert PrefixMemoryConfig(layers_pattern=pattern).layers_pattern is None


@pytest.mark.parametrize("names", [["__base__"], ["__base__"] * 3, ["default"], ["default"] * 4])
def test_a_wrong_number_of_adapter_names_is_refused_whoever_answers(names):
    model = tiny.with_memory(tiny.build())
    model.get_base_model().generation_config.num_beams = 2  # counts in generate() alone
    with pytest.raises(PrefixMemoryError, match=f"adapter_names has {len(names)} entries for a batch of 2 rows"):
        model(input_ids=tiny.tokens(2), adapter_names=names)
    with pytest.raises(PrefixMemoryError, match=f"adapter_names has {len(names)} entries for a batch of 2 rows"):
        model.generate(input_ids=tiny.tokens(2), adapter_names=names, max_new_tokens=2)


@pytest.mark.parametrize("rows", [33, 100, 511, 600])
def test_a_base_whose_vocabulary_was_extended_is_the_same_base(rows, tmp_path):
    def base(size: int) -> nn.Module:
        model = tiny.build()
        model.resize_token_embeddings(size, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(table[:size])
        return model

    table = torch.randn(700, 32)
    get_peft_model(base(rows), PrefixMemoryConfig(task_type="CAUSAL_LM")).save_pretrained(
        tmp_path, save_embedding_layers=False
    )
    PeftModel.from_pretrained(base(rows + 7), tmp_path)
    other = tiny.build(seed=3)  # control: another base of the larger size is refused
    other.resize_token_embeddings(rows + 7, mean_resizing=False)
    with pytest.raises(PrefixMemoryError, match="made for another base model"):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT", "ignore:Already found a `peft_config`")
def test_switching_switches_what_another_method_saves_in_full_as_peft_does():
    base = tiny.build()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["lm_head"]), base)
    model = get_peft_model(base, PrefixMemoryConfig(task_type="CAUSAL_LM", target_modules=["self_attn"]))
    model.add_adapter("b", PrefixMemoryConfig(task_type="CAUSAL_LM", target_modules=["self_attn"]))
    for name, active in (("b", []), ("default", ["default"])):
        model.set_adapter(name)
        assert base.lm_head.active_adapters == active
