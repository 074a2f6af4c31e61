"""A prefix inside the softmax where the scores have a bias for each key, and where keys are repeated: no family adds
the bias to the prefix's scores, and each gives what ``reference.prefix_tuning`` gives."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, DiffLlamaConfig, JetMoeConfig, LongT5Config

import tiny
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError, reference
from prefixmemory.attention.interface import OBSERVERS
from prefixmemory.tuner.layers import memory_layers

sys.path.insert(0, str(Path(__file__).parent.parent))  # experiments is no installed package
from experiments.models.kinds import Kind, build_case, by_name
from experiments.models.running import logits

PREFIX = 3
#: Types whose bias comes in by keyword, of distances (T5) or of queries and distances (Wav2Vec2-BERT), and their kind.
BIASED = {
    **dict.fromkeys(("t5", "mt5", "umt5", "switch_transformers"), by_name("encoder-decoders")),
    "wav2vec2-bert": Kind(
        "speech", "AutoModel", None, "wav2vec2-bert",
        lambda config, rows, length: {"input_features": torch.randn(rows, length, config.feature_projection_input_dim)},
    ),
}  # fmt: skip
BACKENDS = ("eager", "sdpa")


def adapted(model_type: str, attention: str = "eager") -> PeftModel:
    """A model with random contents in a prefix inside the softmax, and in its bias."""
    base = build_case(BIASED[model_type], model_type)
    if attention != base.config._attn_implementation:
        if attention == "sdpa" and not base._supports_sdpa:
            pytest.skip(f"transformers has no sdpa for {model_type}")
        base.set_attn_implementation(attention)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "relative_attention_bias" in name or "distance_embedding" in name:
                parameter.normal_()
    model = get_peft_model(base, PrefixMemoryConfig(placement="inside", prefix_length=PREFIX))
    tiny.randomize(model, std=1.0)
    return model.eval()


@contextmanager
def calls_of(module: Any) -> Iterator[list[dict[str, Any]]]:
    """What the attention function of ``module`` received, and what it answered."""
    seen: list[dict[str, Any]] = []

    def look(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, keywords: dict[str, Any], out: Any, name: str) -> None:
        if m is module:
            seen.append(dict(q=q, k=k, v=v, mask=mask, out=out[0], causal=m.is_causal, backend=name, **keywords))

    OBSERVERS.append(look)
    try:
        yield seen
    finally:
        OBSERVERS.remove(look)


def with_prefix(call: dict[str, Any], keys: Tensor, values: Tensor, bias_of_prefix: float = 0.0) -> Tensor:
    """``reference.prefix_tuning`` on what the base model's attention received, ``[B, T, H, D]``.

    A bias on scores is a scalar product with further dimensions: query i has a 1 in dimension i, and key j has there
    what the bias adds where i meets j.
    """
    q, k, bias = call["q"], call["k"], call["position_bias"]
    queries, width = q.shape[2], q.shape[3] + q.shape[2]
    rows, heads = q.shape[:2]
    root = width**0.5  # which the reference divides by
    number = torch.eye(queries).expand(rows, heads, -1, -1)
    q = torch.cat([q * call["scaling"] * root, number * root], dim=-1)
    k = torch.cat([k, bias.expand(rows, heads, -1, -1).transpose(-1, -2)], dim=-1)
    keys = torch.cat([keys, keys.new_full((*keys.shape[:-1], queries), bias_of_prefix)], dim=-1)
    keys, values = (vectors.expand(rows, -1, -1, -1) for vectors in (keys, values))
    return reference.prefix_tuning(q, k, call["v"], keys, values, allowed(call)).transpose(1, 2)


def allowed(call: dict[str, Any]) -> Tensor | None:
    """Which keys a query may see, as the base model's attention was told."""
    mask = call["mask"]
    if mask is None and call["causal"] and call["backend"] == "sdpa":
        return torch.ones(1, 1, call["q"].shape[2], call["k"].shape[2], dtype=torch.bool).tril()
    if mask is None:
        return None
    return (mask == 0 if mask.is_floating_point() else mask).expand(-1, -1, call["q"].shape[2], -1)


def first_layers(model: PeftModel) -> list[Any]:
    """The first layer of the encoder and of the decoder, if any: those that see the same without a prefix elsewhere."""
    layers = memory_layers(model)
    return [layers[0], *[layer for layer in layers if getattr(layer.site.core, "is_causal", False)][:1]]


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("model_type", BIASED)
def test_the_bias_is_for_the_inputs_keys_alone(model_type, attention, length):
    model = adapted(model_type, attention)
    kind = BIASED[model_type]
    torch.manual_seed(1)
    batch = kind.inputs(model.config, 2, length)
    if "decoder_input_ids" in batch:
        batch["decoder_input_ids"] = batch["decoder_input_ids"][:, :length]
    for layer in first_layers(model):
        vectors = [t[None] for t in layer.memory("default").vectors()]
        with torch.no_grad(), calls_of(layer.site.core) as seen:
            with model.disable_adapter():
                logits(model, batch, model_type)
            logits(model, batch, model_type)
        base, ours = seen
        if layer is not memory_layers(model)[0] and not torch.equal(base["q"], ours["q"]):
            pytest.fail("the decoder's first layer sees other queries: the comparison would be of two inputs")
        assert base["position_bias"].any()
        wanted = with_prefix(base, *vectors)
        torch.testing.assert_close(ours["out"], wanted, atol=1e-5, rtol=1e-5)
        wrong = with_prefix(base, *vectors, bias_of_prefix=1.0)
        assert (wrong - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("attention", BACKENDS)
def test_generation_with_a_cache_gives_the_tokens_of_full_passes(attention):
    model, kind = adapted("t5", attention), BIASED["t5"]
    batch = kind.inputs(model.config, 2, 7)
    made = model.generate(**batch, do_sample=False, max_new_tokens=5, min_new_tokens=5)
    ids = batch["decoder_input_ids"]
    with torch.no_grad():
        for _ in range(5):
            new = logits(model, batch | {"decoder_input_ids": ids}, "t5")[:, -1]
            new[:, model.generation_config.eos_token_id or 1] = -torch.inf
            ids = torch.cat([ids, new.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(made, ids)


def test_rows_of_the_base_model_in_a_mixed_batch_are_the_base_models_without_a_mask():
    """Eager attention of encoders has no mask; what leaves the prefix out of a row is one that adds, not a bool."""
    torch.manual_seed(0)
    base = AutoModel.from_config(
        BertConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48),
        attn_implementation="eager",
    ).eval()
    ids = tiny.tokens(2, 9)
    with torch.no_grad():
        expected = base(ids).last_hidden_state
        model = get_peft_model(base, PrefixMemoryConfig(placement="inside", prefix_length=PREFIX)).eval()
        tiny.randomize(model, std=1.0)
        alone = model(input_ids=ids[:1]).last_hidden_state
        mixed = model(input_ids=ids, adapter_names=["default", "__base__"]).last_hidden_state
    torch.testing.assert_close(mixed[1], expected[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed[0], alone[0], atol=1e-5, rtol=0)
    assert (alone[0] - expected[0]).abs().max() > 1e-2


SMALL = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


@pytest.mark.parametrize("attention", BACKENDS)
def test_the_heads_of_every_expert_have_the_prefix_of_their_key_head(attention):
    """JetMoe gives each of a token's experts all the key heads, one after the other."""
    config = JetMoeConfig(
        **{**SMALL, "num_attention_heads": 4}, num_key_value_heads=2, kv_channels=8, num_local_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    model = get_peft_model(base, PrefixMemoryConfig(placement="inside", prefix_length=PREFIX))
    tiny.randomize(model, std=1.0)
    model.eval()
    layer = memory_layers(model)[0]
    keys, values = (t[None] for t in layer.memory("default").vectors())
    with torch.no_grad(), calls_of(layer.site.core) as seen:
        with model.disable_adapter():
            model(input_ids=tiny.tokens())
        model(input_ids=tiny.tokens())
    base_call, ours = seen
    zero = {"position_bias": torch.zeros(1, 1, *base_call["q"].shape[2:3], base_call["k"].shape[2])}
    wanted = with_prefix(base_call | zero, keys.repeat(1, 2, 1, 1), values.repeat(1, 2, 1, 1))
    torch.testing.assert_close(ours["out"], wanted, atol=1e-5, rtol=1e-5)
    interleaved = (t.repeat_interleave(2, dim=1) for t in (keys, values))
    assert (with_prefix(base_call | zero, *interleaved) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("config", "model_class", "reason"),
    [
        (DiffLlamaConfig(**SMALL), AutoModelForCausalLM, "each half of its value heads"),
        (
            LongT5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4),
            AutoModel,
            "LongT5LocalAttention.: it does not use transformers' attention interface",
        ),
    ],
    ids=["diffllama", "longt5"],
)
def test_what_cannot_be_had_inside_is_refused_before_anything_runs(config, model_class, reason):
    with pytest.raises(PrefixMemoryError, match=reason):
        get_peft_model(model_class.from_config(config), PrefixMemoryConfig(placement="inside", prefix_length=PREFIX))


@pytest.mark.parametrize("keyword", ["indices", "block_indices"])
def test_numbers_of_keys_are_refused_rather_than_shifted(keyword):
    model = tiny.with_memory(tiny.build("llama_gqa", "sdpa"), placement="inside", prefix_length=PREFIX)
    numbers = {keyword: torch.zeros(2, 9, 4, dtype=torch.int32)}
    with pytest.raises(PrefixMemoryError, match="sparse keys of LlamaAttention with attn_implementation='sdpa'"):
        model(input_ids=tiny.tokens(), **numbers)
