"""What people do with a model that holds memories, beyond the usual path: each was silently wrong or broke once."""

from __future__ import annotations

import gc
import io
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

import tiny
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError, register_memory
from prefixmemory.memories.registry import MEMORIES
from prefixmemory.tuner.layers import memory_layers

IDS = tiny.tokens(2, 9)


def default() -> PrefixMemoryConfig:
    return PrefixMemoryConfig(task_type="CAUSAL_LM")


def fresh(**fields: object) -> PeftModel:
    return get_peft_model(tiny.build(), PrefixMemoryConfig(task_type="CAUSAL_LM", **fields)).train()


def passes_of_one_step(model: PeftModel) -> int:
    """How often a training step passes the model."""
    count = [0]
    handle = model.get_base_model().model.norm.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    model(input_ids=IDS, labels=IDS).loss.backward()
    handle.remove()
    return count[0]


# The mean of features


def test_only_the_first_step_passes_the_model_twice():
    model = fresh()
    assert [passes_of_one_step(model) for _ in range(3)] == [2, 1, 1]


def test_a_memory_that_has_learned_without_a_mean_is_asked_once():
    model = fresh()
    with torch.no_grad():
        for layer in memory_layers(model):
            layer.memory("default").B.normal_()
    assert [passes_of_one_step(model) for _ in range(3)] == [2, 1, 1]
    assert not any(mean.any() for mean in tiny.means(model).values())


def test_an_adapter_that_is_chosen_later_gets_its_mean_then():
    model = fresh()
    model.add_adapter("later", default())
    model(input_ids=IDS)
    assert not any(mean.any() for mean in tiny.means(model, "later").values())
    model.set_adapter("later")
    assert [passes_of_one_step(model) for _ in range(2)] == [2, 1]
    assert all(mean.any() for mean in tiny.means(model, "later").values())


def test_unload_leaves_no_hook_of_adapters_that_were_never_trained():
    model = fresh()
    model.add_adapter("other", default())
    assert not any(module._forward_pre_hooks for module in model.unload().modules())


def test_what_was_learned_with_a_mean_is_not_loaded_without_it():
    """The parameters that require a gradient are not the whole adapter: strict=False would give other answers."""
    model = tiny.with_memory(tiny.build(), **tiny.DEFAULT)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(PrefixMemoryError, match="come without its mean"):
        fresh().load_state_dict(trained, strict=False)
    model.load_state_dict(trained, strict=False)  # here the mean is known


def test_a_memory_that_has_not_learned_needs_no_mean():
    model = fresh()
    model.load_state_dict({name: p for name, p in model.named_parameters() if p.requires_grad}, strict=False)


# What stays behind


def test_ctrl_c_lets_go_of_the_tensors_of_the_lost_step():
    model, seen = tiny.with_memory(tiny.build(), **tiny.DEFAULT).train(), []
    attention = model.get_base_model().model.layers[1].self_attn

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handles = [
        attention.q_proj.register_forward_hook(lambda _, args, output: seen.append(weakref.ref(output))),
        attention.o_proj.register_forward_pre_hook(interrupt, prepend=True),
    ]
    with pytest.raises(KeyboardInterrupt) as caught:
        model(input_ids=IDS)
    del caught
    for handle in handles:
        handle.remove()
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None


@pytest.mark.parametrize("feature_map", ["elu", "gelu", "relu", "silu", "identity", "softmax", "mlp"])
def test_a_model_is_pickled_whole(feature_map):
    model, file = tiny.with_memory(tiny.build(), feature_map=feature_map), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(input_ids=IDS).logits, model(input_ids=IDS).logits)


# Plan and config


def test_a_scale_that_no_plan_would_follow_cannot_be_set():
    layer = memory_layers(tiny.with_memory(tiny.build()))[0]
    with pytest.raises(TypeError):
        layer.scale["default"] = 0.0  # type: ignore[index]


@pytest.mark.parametrize(("field", "value"), [("prefix_length", 4), ("scale", float("nan")), ("feature_map", "elo")])
def test_a_value_set_after_the_config_was_made_is_checked_too(field, value):
    config = default()
    setattr(config, field, value)
    with pytest.raises(PrefixMemoryError, match=field):
        get_peft_model(tiny.build(), config)


def test_a_memory_of_ones_own_is_shown_the_rotated_query_that_it_asks_for():
    @register_memory("rotated")
    class Rotated(nn.Module):
        queries = ("rotary",)

        def __init__(self, site):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(site.heads, site.head_dim, site.value_dim))

        def forward(self, query):
            return torch.einsum("bthd,hdv->bthv", query, self.w)

    try:
        own = tiny.with_memory(tiny.build(), memory="rotated", normalize="none", rank=None)
        ours = tiny.with_memory(tiny.build(), query="rotary", feature_map="identity")
        assert torch.allclose(own(input_ids=IDS).logits, ours(input_ids=IDS).logits, atol=1e-5)
    finally:
        del MEMORIES["rotated"]


@pytest.mark.parametrize(
    "fields", [{}, {"target_modules": [f"model.language_model.layers.{n}.self_attn" for n in (0, 1)]}]
)
def test_layers_to_transform_counts_where_targets_have_whole_names(fields):
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4,
        projection_dim=32,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=tiny.CONFIGS["llama"]))
    adapted = get_peft_model(model, PrefixMemoryConfig(layers_to_transform=[1], **fields))
    names = [n for n, _ in adapted.named_modules() if n.endswith(".prefix_memory")]
    assert names == ["base_model.model.model.language_model.layers.1.self_attn.prefix_memory"]


# Adapters by row


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_the_number_of_adapter_names_is_checked_where_no_adapter_answers(task_type):
    model = get_peft_model(tiny.build(), PrefixMemoryConfig(task_type=task_type)).eval()
    with pytest.raises(PrefixMemoryError, match="5 entries for a batch of 2 rows"):
        model(input_ids=IDS, adapter_names=["__base__"] * 5)


def test_threads_do_not_swap_the_modules_saved_in_full():
    model = tiny.with_memory(tiny.build(), modules_to_save=["lm_head"])
    model.add_adapter("other", PrefixMemoryConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    model.eval()

    def run(name: str) -> Tensor:
        with torch.no_grad():
            return model(input_ids=IDS, adapter_names=[name] * 2, use_cache=False).logits

    expected = {name: run(name) for name in ("default", "other", "__base__")}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(3) as pool:
            wrong = pool.map(lambda name: sum(not torch.equal(run(name), expected[name]) for _ in range(20)), expected)
            assert list(wrong) == [0, 0, 0]
    finally:
        sys.setswitchinterval(interval)


# Checkpoints


def test_the_embeddings_of_a_resized_vocabulary_are_saved_and_loaded(tmp_path: Path):
    from transformers import AutoModelForCausalLM

    tiny.save_tiny(tmp_path / "base")

    def resized() -> nn.Module:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        base.resize_token_embeddings(140)
        return base

    model = tiny.with_memory(resized())
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(resized(), tmp_path / "adapter").eval()
    assert torch.equal(loaded(input_ids=IDS + 12).logits, model(input_ids=IDS + 12).logits)
