"""PrefixMemoryConfig: what it refuses, and how it says so; that it survives its files; where it may be applied."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftType, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig

import tiny
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError, register_feature_map
from prefixmemory.memories.feature_maps import FEATURE_MAPS, build_feature_map

MAPS = "elu, gelu, relu, silu, identity, softmax, mlp"


# Validation: the message names the field, its value and the fix


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feature_map": "elo"}, f"feature_map='elo' is not known. Did you mean 'elu'? Choose one of: {MAPS}."),
        ({"feature_map": "xyz"}, f"feature_map='xyz' is not known. Choose one of: {MAPS}."),
        ({"feature_map": None}, f"feature_map=None is not known. Choose one of: {MAPS}."),
        (
            {"normalize": "feature_l1"},
            "normalize='feature_l1' is not known. Did you mean 'feature_l2'? "
            "Choose one of: none, query_rms, feature_l2, feature_mean.",
        ),
        ({"query": "rotray"}, "query='rotray' is not known. Did you mean 'rotary'? Choose one of: content, rotary."),
        ({"dropout": 1.0}, "dropout=1.0 is out of range: give a probability in [0, 1)."),
        ({"dropout": -0.1}, "dropout=-0.1 is out of range: give a probability in [0, 1)."),
        ({"dropout": float("nan")}, "dropout=nan is out of range: give a probability in [0, 1)."),
        ({"dropout": "0.1"}, "dropout='0.1' is out of range: give a probability in [0, 1)."),
        ({"dropout": None}, "dropout=None is out of range: give a probability in [0, 1)."),
        ({"scale": float("inf")}, "scale=inf is out of range: give a number between -1e6 and 1e6."),
        ({"scale": float("nan")}, "scale=nan is out of range: give a number between -1e6 and 1e6."),
        ({"scale": "1.0"}, "scale='1.0' is out of range: give a number between -1e6 and 1e6."),
        ({"scale": None}, "scale=None is out of range: give a number between -1e6 and 1e6."),
        ({"rank": 0}, "rank=0 is out of range: give a positive integer, or None."),
        ({"rank": -3}, "rank=-3 is out of range: give a positive integer, or None."),
        ({"rank": 2.0}, "rank=2.0 is out of range: give a positive integer, or None."),
        ({"rank": "8"}, "rank='8' is out of range: give a positive integer, or None."),
        *(
            ({"output_limit": value}, f"output_limit={value!r} is out of range: give a number above 0, or None.")
            for value in (0, 0.0, -1, float("nan"), float("inf"), "0.5")
        ),
        (
            {"mixing": "layer", "output_limit": 0.3},
            "output_limit=0.3 needs mixing='none': where λ mixes, λ sets the memory's share.",
        ),
        (
            {"prefix_length": 3, "placement": "inside", "output_limit": 0.3},
            "output_limit=0.3 needs placement='outside': inside, the softmax itself sets the prefix's share.",
        ),
        ({"mix": 0.3}, "mix=0.3 needs mixing: without it nothing is mixed."),
        ({"feature_dim": 0}, "feature_dim=0 is out of range: give a positive integer, or None."),
        ({"target_modules": "("}, "target_modules='(' is not a valid regular expression"),
        ({"exclude_modules": "*a"}, "exclude_modules='*a' is not a valid regular expression"),
        ({"target_modules": "("}, "Give a list of names, such as target_modules=['self_attn']"),
        ({"layers_pattern": "h"}, "layers_pattern='h' needs layers_to_transform: give the layer indices too."),
        (
            {"target_modules": r".*attn", "layers_to_transform": [1]},
            "layers_to_transform=[1] does not work with the regular expression target_modules='.*attn': "
            "give a list of names",
        ),
        (
            {"feature_mpa": "elu"},
            "PrefixMemoryConfig has no field 'feature_mpa'. Did you mean 'feature_map'? "
            "If a newer prefixmemory wrote it, upgrade",
        ),
        ({"active_from": "end"}, "active_from='end' is not known."),
        ({"active_from": "invocation"}, "active_from='invocation' needs invocation_tokens"),
        ({"active_from": "invocation", "invocation_tokens": []}, "invocation_tokens=[] is no list of token ids"),
        ({"active_from": "answer", "invocation_tokens": [1.5]}, "invocation_tokens=[1.5] is no list of token ids"),
        ({"active_from": "answer", "invocation_tokens": [-1]}, "invocation_tokens=[-1] is no list of token ids"),
        ({"active_from": "answer", "invocation_tokens": "<a>"}, "invocation_tokens='<a>' is no list of token ids"),
        ({"invocation_tokens": [3]}, "invocation_tokens=[3] needs active_from='invocation'"),
        ({"strict_invocation": True}, "strict_invocation=True needs active_from='invocation'"),
        ({"active_from": "auto", "invocation_tokens": [3]}, "invocation_tokens=[3] needs active_from='invocation'"),
        ({"strict_invocation": 1}, "strict_invocation=1 is no truth value"),
        ({"r": 8}, "PrefixMemoryConfig has no field 'r'. Did you mean 'rank'?"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("untyped")
def test_a_wrong_field_is_refused_by_name_value_and_fix(fields, message):
    with pytest.raises(PrefixMemoryError, match=re.escape(message)):
        PrefixMemoryConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"dropout": 0},
        {"dropout": 0.99},
        {"scale": 0.0},
        {"scale": -2},
        {"rank": 1},
        {"output_limit": 0.001},
        {"output_limit": 7},
        {"output_limit": None},
        {"feature_dim": 3, "feature_map": "mlp"},
        {"target_modules": r".*\.self_attn"},
        {"layers_to_transform": [0], "layers_pattern": "h"},
    ],
    ids=str,
)
@pytest.mark.usefixtures("untyped")
def test_values_at_the_edge_of_what_is_allowed_are_accepted(fields):
    config = PrefixMemoryConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


def test_the_defaults_are_the_documented_ones():
    config = PrefixMemoryConfig()
    assert config.peft_type is PeftType.PREFIX_MEMORY
    chosen = {f.name: getattr(config, f.name) for f in dataclasses.fields(PrefixMemoryConfig)}
    expected = dict(feature_map="elu", normalize="feature_mean", query="content", rank=8, scale=1.0, dropout=0.0)
    assert {name: chosen[name] for name in expected} == expected
    for name in ("feature_dim", "target_modules", "exclude_modules", "layers_to_transform", "modules_to_save"):
        assert chosen[name] is None
    assert chosen["share_heads"] is False


@pytest.mark.parametrize("fields", [{}, dict.fromkeys(tiny.DEFAULT) | {"normalize": "none"}], ids=str)
@pytest.mark.parametrize("placement", ["inside", "outside"])
def test_prefix_vectors_have_no_rank_limit_or_mean_in_the_config_and_its_file(placement, fields, tmp_path):
    config = PrefixMemoryConfig(placement=placement, prefix_length=3, **fields)
    assert (config.rank, config.output_limit, config.normalize) == (None, None, "none")
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["rank"], written["output_limit"], written["normalize"]) == (None, None, "none")
    assert PrefixMemoryConfig.from_pretrained(tmp_path) == config


def test_prefix_vectors_refuse_a_rank_that_was_asked_for():
    for rank in (1, 7, 8, 9):  # 8 is the default of a free memory: given is given
        message = f"rank={rank} needs prefix_length=None: prefix vectors are p keys and values; p is their rank."
        with pytest.raises(PrefixMemoryError, match=re.escape(message)):
            PrefixMemoryConfig(prefix_length=3, rank=rank)


def test_a_memory_that_mixes_has_no_limit_in_the_config_and_its_file(tmp_path):
    for mixing in ("fixed", "layer", "head"):
        config = PrefixMemoryConfig(mixing=mixing)
        assert config.output_limit is None and config.rank is not None
        config.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["output_limit"] is None
        assert PrefixMemoryConfig.from_pretrained(tmp_path) == config


def test_the_papers_memory_stays_so_in_its_file(tmp_path):
    PrefixMemoryConfig(rank=None, output_limit=None, normalize="none").save_pretrained(tmp_path)
    loaded = PrefixMemoryConfig.from_pretrained(tmp_path)
    assert (loaded.rank, loaded.output_limit, loaded.normalize) == (None, None, "none")


# Feature maps


def test_a_feature_dim_for_a_map_without_one_is_refused():
    message = (
        "feature_dim=8 has no meaning for feature_map='elu', whose size follows from the head. "
        "Leave feature_dim out, or use feature_map='mlp'."
    )
    with pytest.raises(PrefixMemoryError, match=re.escape(message)):
        build_feature_map("elu", groups=1, head_dim=4, feature_dim=8)


def test_a_refused_feature_dim_leaves_the_base_model_as_it_was():
    base = tiny.build()
    keys, names = list(base.state_dict()), [name for name, _ in base.named_modules()]
    with pytest.raises(PrefixMemoryError, match="feature_dim=8 has no meaning for feature_map='elu'"):
        get_peft_model(base, PrefixMemoryConfig(feature_dim=8))
    assert list(base.state_dict()) == keys
    assert [name for name, _ in base.named_modules()] == names
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()) == 0


def test_an_unknown_feature_map_is_refused_when_built():
    with pytest.raises(PrefixMemoryError, match=re.escape("feature_map='sliu' is not known. Did you mean 'silu'?")):
        build_feature_map("sliu", groups=1, head_dim=4, feature_dim=None)


@pytest.mark.usefixtures("feature_map_names")
def test_a_feature_map_name_is_never_overwritten():
    elu = FEATURE_MAPS["elu"]
    for name in ("elu", "mlp"):
        message = f"feature_map='{name}' is registered already. Choose another name."
        with pytest.raises(PrefixMemoryError, match=re.escape(message)):
            register_feature_map(name)(torch.tanh)
    assert FEATURE_MAPS["elu"] is elu
    assert register_feature_map("mine")(torch.tanh) is torch.tanh
    assert FEATURE_MAPS["mine"] is torch.tanh
    with pytest.raises(PrefixMemoryError, match="feature_map='mine' is registered already"):
        register_feature_map("mine")(torch.sin)


@pytest.mark.usefixtures("feature_map_names")
def test_a_registered_feature_map_is_offered_by_name():
    with pytest.raises(PrefixMemoryError, match="feature_map='cosine' is not known"):
        PrefixMemoryConfig(feature_map="cosine")
    register_feature_map("cosine")(torch.cos)
    assert PrefixMemoryConfig(feature_map="cosine").feature_map == "cosine"
    with pytest.raises(PrefixMemoryError, match=r"Did you mean 'cosine'\?"):
        PrefixMemoryConfig(feature_map="cosin")


# Round trips

#: A value for every field that differs from its default.
FULL: dict[str, Any] = dict(
    task_type="CAUSAL_LM", feature_map="mlp", feature_dim=12, normalize="query_rms", query="rotary", rank=3,
    share_heads=True, scale=0.5, dropout=0.25, target_modules={"self_attn", "attn"}, exclude_modules={"vision"},
    layers_to_transform=[0, 2], layers_pattern="layers", modules_to_save=["lm_head"], feed_forward=6,
    feed_forward_limit=0.2,
    head_scale=0.75,
    base_model_fingerprint=[0.5, -0.25], base_model_name_or_path="somewhere", revision="main", inference_mode=True,
    mixing="layer", mix=0.25, active_from="question", invocation_tokens=[3, 5], strict_invocation=True,
    rank_pattern={"layers.0.self_attn": 2},
    scale_pattern={"layers.0.self_attn": 2.0}, trainable_token_indices=[3, 4],
)  # fmt: skip
#: Those that exclude some of them, or each other.
KERNEL: dict[str, Any] = dict(prefix_length=3, normalizer=True, reparameterize=4)
INSIDE: dict[str, Any] = dict(placement="inside", prefix_length=3, similarity="softmax")
LIMITED: dict[str, Any] = dict(output_limit=0.37, output_limit_pattern={"layers.0.self_attn": None})
OWN_MEMORY = {"memory", "memory_options"}  # need a registered one: test_own_memory.py
WRITTEN_BY_US = {
    "weights_sha256",
    "resized_vocabulary",
    "prefixmemory_version",
    "peft_type",
    "peft_version",
    "auto_mapping",
}


def test_the_full_examples_give_every_field_another_value_than_its_default():
    default = PrefixMemoryConfig()
    names = {f.name for f in dataclasses.fields(PrefixMemoryConfig)} - WRITTEN_BY_US
    assert names == set(FULL) | set(KERNEL) | set(INSIDE) | set(LIMITED) | OWN_MEMORY
    for fields in (FULL, KERNEL, INSIDE, LIMITED):
        assert [name for name in fields if getattr(default, name) == fields[name]] == []


@pytest.mark.parametrize(
    "fields", [{}, FULL, KERNEL, INSIDE, LIMITED], ids=["default", "full", "kernel", "inside", "limited"]
)
def test_a_config_survives_dict_copy_and_file(fields, tmp_path):
    config = PrefixMemoryConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields
    assert PrefixMemoryConfig(**config.to_dict()) == config
    assert copy.deepcopy(config) == config
    assert dataclasses.replace(config) == config
    assert dataclasses.replace(config, scale=7.0) != config

    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "PREFIX_MEMORY"
    assert written["weights_sha256"] is None  # no weights beside it
    for loaded in (PrefixMemoryConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert type(loaded) is PrefixMemoryConfig
        assert loaded.peft_type is PeftType.PREFIX_MEMORY
        assert loaded == config


def test_a_config_is_found_in_a_subfolder(tmp_path):
    PrefixMemoryConfig(rank=5).save_pretrained(tmp_path / "inner")
    assert PrefixMemoryConfig.from_pretrained(tmp_path, subfolder="inner").rank == 5


def test_an_unknown_field_in_the_file_is_refused_not_dropped(tmp_path):
    # PEFT's own configs warn and drop it
    PrefixMemoryConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rnk": 4}))
    for read in (PrefixMemoryConfig.from_pretrained, PeftConfig.from_pretrained):
        with pytest.raises(PrefixMemoryError, match=re.escape("no field 'rnk'. Did you mean 'rank'?")):
            read(tmp_path)


def test_lists_of_module_names_become_sets():
    config = PrefixMemoryConfig(target_modules=["a", "b"], exclude_modules=["c"])
    assert (config.target_modules, config.exclude_modules) == ({"a", "b"}, {"c"})


# Models and targets that there is no memory for


def refused(base: nn.Module, message: str, **fields: Any) -> str:
    """The refusal, after checking that it left nothing behind."""
    keys, names = list(base.state_dict()), [name for name, _ in base.named_modules()]
    trainable = [p.requires_grad for p in base.parameters()]
    with pytest.raises(PrefixMemoryError, match=re.escape(message)) as refusal:
        get_peft_model(base, PrefixMemoryConfig(task_type="CAUSAL_LM", **fields))
    assert list(base.state_dict()) == keys
    assert [name for name, _ in base.named_modules()] == names
    assert [p.requires_grad for p in base.parameters()] == trainable
    return str(refusal.value)


def test_a_model_without_attention_is_refused():
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2)
    )
    message = refused(mamba, "MambaForCausalLM has no softmax self-attention that prefixmemory knows")
    assert "(no class is called ...Attention)" in message
    assert "CONTRIBUTING.md" in message
    assert "nowhere to put a memory" in message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_modules": ["self_atn"]}, ["target_modules=['self_atn'] matches no", "Did you mean 'self_attn'?"]),
        ({"target_modules": ["xyz"]}, ["target_modules=['xyz'] matches no", "['self_attn']"]),
        ({"target_modules": r"decoder\..*"}, ["target_modules='decoder", "matches no attention module"]),
        ({"layers_to_transform": [7]}, ["layers_to_transform=[7] matches no attention module"]),
        ({"layers_to_transform": [0], "layers_pattern": "h"}, ["layers_pattern='h' matches no attention module"]),
        ({"exclude_modules": ["self_attn"]}, ["exclude_modules=['self_attn'] matches no attention module"]),
        ({"target_modules": []}, ["target_modules=[] matches no attention module"]),
    ],
    ids=str,
)
def test_a_target_that_matches_nothing_is_refused(fields, words):
    message = refused(tiny.build(), "matches no attention module of LlamaForCausalLM.", **fields)
    assert [word for word in words if word not in message] == []
    assert "Its 2 attention modules are called ['self_attn'], from 'model.layers.0.self_attn' on" in message
    assert "leave target_modules out for all of them" in message


@pytest.mark.parametrize(
    ("target", "matched"),
    [
        (["q_proj"], "'model.layers.0.self_attn.q_proj'"),
        (["mlp"], "'model.layers.0.mlp'"),
        (["self_attn", "lm_head"], "'lm_head'"),
        (r".*\.self_attn.*", "'model.layers.0.self_attn.q_proj'"),
    ],
    ids=str,
)
def test_a_target_that_is_no_attention_is_refused(target, matched):
    message = refused(tiny.build(), f"matches {matched}, which is no softmax attention", target_modules=target)
    assert f"target_modules={sorted(target) if isinstance(target, list) else target!r}" in message
    assert "Name attention modules, here ['self_attn']" in message


def test_a_refused_second_adapter_leaves_the_first_as_it_was():
    model = tiny.with_memory(tiny.build())
    keys = list(model.state_dict())
    ids = tiny.tokens()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for fields in ({"target_modules": ["q_proj"]}, {"target_modules": ["xyz"]}, {"feature_dim": 8}):
            with pytest.raises(PrefixMemoryError):
                model.add_adapter("second", PrefixMemoryConfig(**fields))
        assert torch.equal(model(input_ids=ids).logits, before)
    assert list(model.state_dict()) == keys
    assert list(model.peft_config) == ["default"]
    model.add_adapter("second", PrefixMemoryConfig())
    assert len(tiny.memory_parameters(model, "second")) == 4  # A and B in two layers


def test_what_was_saved_before_heads_had_a_scale_learned_at_1():
    old = PrefixMemoryConfig(feed_forward=4).to_dict()
    assert old.pop("head_scale") == 0.25
    assert PrefixMemoryConfig(**old).head_scale == 1.0
