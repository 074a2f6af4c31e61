"""Instruments that look into the softmax: the observer, the trade-off, the shift."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import BertConfig, BertModel, BloomConfig, BloomForCausalLM
from transformers.modeling_utils import AttentionInterface

import tiny
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError, reference, set_scale
from prefixmemory.analysis import Call, observe, shift, tradeoff
from prefixmemory.analysis.inputs import run, text_sites
from prefixmemory.analysis.shift import js_distance
from prefixmemory.analysis.tradeoff import prefix_share
from prefixmemory.attention.interface import OBSERVERS, install_tap

FAMILIES = ("llama_gqa", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox")


def inside(family: str = "llama_gqa", backend: str = "eager", length: int = 5) -> PeftModel:
    return tiny.with_memory(tiny.build(family, backend), placement="inside", prefix_length=length)


def peft_prefix(family: str = "llama_gqa", backend: str = "eager", length: int = 5) -> PeftModel:
    """PEFT's prefix tuning; a cache of its own needs key/value heads."""
    return get_peft_model(
        tiny.build(family, backend), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
    ).eval()


def calls_of(model: torch.nn.Module, ids: torch.Tensor) -> list[Call]:
    seen: list[Call] = []
    with observe(model, seen.append):
        run(model, ids)
    return seen


def eager_maps(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(model(input_ids=ids, output_attentions=True, use_cache=False).attentions)


# The observer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ["none", "inside"])
def test_maps_from_observed_scores_are_the_eager_maps(family: str, adapter: str) -> None:
    ids = tiny.tokens(2, 11)
    model = tiny.build(family, "eager") if adapter == "none" else inside(family)
    rows = torch.tensor([0, 3, 10])
    maps = eager_maps(model, ids)
    calls = calls_of(model, ids)
    assert [call.name for call in calls] == list(text_sites(model))
    for call, expected in zip(calls, maps, strict=True):
        assert expected.shape[-1] == 11 + (5 if adapter == "inside" else 0)
        torch.testing.assert_close(torch.softmax(call.scores(rows), dim=-1), expected[:, :, rows], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("adapter", ["none", "inside", "peft"])
def test_maps_are_the_same_in_every_backend(adapter: str) -> None:
    ids, rows = tiny.tokens(1, 13), torch.arange(13)
    maps = {}
    for backend in ("eager", "sdpa"):
        torch.manual_seed(0)
        model = {"none": lambda b: tiny.build(attention=b), "inside": lambda b: inside(backend=b)}.get(
            adapter, lambda b: peft_prefix(backend=b)
        )(backend)
        torch.manual_seed(0)
        maps[backend] = [torch.softmax(call.scores(rows), dim=-1) for call in calls_of(model, ids)]
    for eager, sdpa in zip(maps["eager"], maps["sdpa"], strict=True):
        if adapter != "peft":  # whose start values are drawn anew
            torch.testing.assert_close(sdpa, eager, atol=1e-6, rtol=1e-5)
        assert torch.equal(sdpa[..., -13:].triu(1), torch.zeros_like(sdpa[..., -13:]))


def test_the_observer_sees_what_the_function_received() -> None:
    """Behind the prefix: key and value hold it, and attention over them gives the output that was seen."""
    model = inside(backend="sdpa")
    layer = model.base_model.model.model.layers[0].self_attn.prefix_memory
    call = calls_of(model, tiny.tokens(1, 7))[0]
    keys, values = layer.memory("default").vectors()
    assert torch.equal(call.key[0, :, :5], keys)
    assert torch.equal(call.value[0, :, :5], values)
    expected = scaled_dot_product_attention(
        call.query, call.key, call.value, attn_mask=call.mask, scale=call.scaling, enable_gqa=True
    )
    torch.testing.assert_close(call.output, expected.transpose(1, 2), atol=1e-6, rtol=1e-5)


def test_a_mask_for_left_padding_is_kept() -> None:
    model = inside(backend="sdpa")
    ids = tiny.tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    seen: list[Call] = []
    with torch.no_grad(), observe(model, seen.append):
        model(input_ids=ids, attention_mask=mask)
    weights = torch.softmax(seen[0].scores(torch.tensor([7])), dim=-1)
    assert (weights[0, :, :, 5:8] == 0).all()
    assert (weights[1, :, :, 5:8] > 0).all()


def test_the_observer_leaves_nothing_behind() -> None:
    model, ids = inside(), tiny.tokens()
    expected = model(ids).logits
    seen: list[Call] = []
    with pytest.raises(RuntimeError, match="stop"), observe(model, seen.append):
        assert torch.equal(model(ids).logits, expected)
        raise RuntimeError("stop")
    count, interface = len(seen), AttentionInterface.get_interface
    assert count == 2
    assert OBSERVERS == []
    assert torch.equal(model(ids).logits, expected)
    assert len(seen) == count
    install_tap()
    assert AttentionInterface.get_interface is interface  # once a process


def test_only_the_given_model_is_observed() -> None:
    seen: list[Call] = []
    with torch.no_grad(), observe(tiny.build(), seen.append):
        tiny.build(seed=1)(tiny.tokens())
    assert seen == []


def test_an_encoder_is_observed() -> None:
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40)
    model = BertModel(config, add_pooling_layer=False).eval()
    model.set_attn_implementation("sdpa")
    (call,) = calls_of(model, torch.arange(3, 12)[None])
    assert (torch.softmax(call.scores(torch.tensor([0])), dim=-1) > 0).all()  # no causal mask


def test_a_model_without_the_interface_is_refused() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4)).eval()
    with pytest.raises(PrefixMemoryError, match="does not use transformers' attention interface") as error:
        shift(get_peft_model(model, PrefixMemoryConfig(task_type="CAUSAL_LM")), tiny.tokens() % 50)
    assert "\n" not in str(error.value)
    assert "query=" not in str(error.value)


def test_other_masks_are_refused() -> None:
    call = calls_of(tiny.build(), tiny.tokens(1, 4))[0]
    other = Call(**{**vars(call), "implementation": "flash_attention_2"})
    with pytest.raises(PrefixMemoryError, match=r"flash_attention_2.*sdpa"):
        other.scores(torch.tensor([0]))


# The trade-off


def test_share_is_that_of_the_reference() -> None:
    call = calls_of(inside(), tiny.tokens(1, 9))[0]
    rows = torch.tensor([2, 8])
    allowed = torch.ones(9, 9, dtype=torch.bool).tril()[rows][None, None]
    expected = reference.prefix_share(
        call.query[:, :, rows], call.key[:, :, 5:], call.key[:, :, :5], allowed.expand(1, 1, -1, -1)
    )
    torch.testing.assert_close(prefix_share(call, 5, rows), expected[..., 0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", [inside, peft_prefix])
def test_shares_are_those_of_the_eager_maps(make: object) -> None:
    model, ids = make(), tiny.tokens(1, 40)  # type: ignore[operator]
    found = tradeoff(model, ids, [8, 40], queries=3)
    assert (found.quantity, found.prefix_length, found.lengths) == ("share", 5, [8, 40])
    for length, values in zip(found.lengths, found.values, strict=True):
        for layer, weights in zip(values, eager_maps(model, ids[:, :length]), strict=True):
            expected = weights[0, :, -3:, :5].sum(dim=-1).mean(dim=-1)
            torch.testing.assert_close(torch.tensor(layer), expected, atol=1e-6, rtol=1e-5)


def test_share_grows_with_the_prefix_and_falls_with_the_input() -> None:
    """Of keys drawn alike, p beside L take about p / (p + L)."""
    ids = tiny.tokens(1, 256)
    means = {}
    for p in (1, 16):
        found = tradeoff(inside(backend="sdpa", length=p), ids, [16, 256])
        means[p] = [torch.tensor(values).mean().item() for values in found.values]
    assert means[1][0] > 4 * means[1][1]
    assert means[16][0] > 4 * means[1][0]


def test_no_share_at_scale_zero() -> None:
    model = inside()
    set_scale(model, 0.0)
    with pytest.raises(PrefixMemoryError, match="holds neither, or its scale is 0"):
        tradeoff(model, tiny.tokens(), [4])


@pytest.mark.parametrize(
    "config", [{}, {"mixing": "fixed", "mix": 0.7}, {"rank": 2, "share_heads": True}, {"output_limit": 0.3}], ids=str
)
def test_ratio_of_a_memory_is_computed_from_its_parts(config: dict[str, object]) -> None:
    model, ids = tiny.with_memory(tiny.build(), **config), tiny.tokens(1, 10)
    site = model.base_model.model.model.layers[0].self_attn
    layer, kept = site.prefix_memory, []
    handle = site.q_proj.register_forward_hook(lambda m, a, output: kept.append(output))
    call = calls_of(model, ids)[0]
    handle.remove()
    outputs = call.output[0]
    answer = layer.memory("default")(kept[0][0].view(10, 4, 8))
    change = answer if not config.get("mixing") else 0.3 * answer
    if "output_limit" in config:
        change = change / (1 + (change.norm(dim=-1) / (0.3 * outputs.norm(dim=-1)))[..., None] ** 2).sqrt()
    expected = (change.norm(dim=-1) / outputs.norm(dim=-1))[-4:].mean(dim=0)
    found = tradeoff(model, ids, [10], queries=4)
    assert (found.quantity, found.prefix_length) == ("ratio", None)
    torch.testing.assert_close(torch.tensor(found.values[0][0]), expected, atol=1e-5, rtol=1e-4)


def test_ratio_follows_the_scale() -> None:
    model, ids = tiny.with_memory(tiny.build(), layers_to_transform=[0]), tiny.tokens(1, 10)
    before = torch.tensor(tradeoff(model, ids, [10]).values)
    set_scale(model, 2.0)
    assert before.shape == (1, 1, 4)
    torch.testing.assert_close(torch.tensor(tradeoff(model, ids, [10]).values), 2 * before)


@pytest.mark.parametrize("mixing", ["fixed", "layer", "head"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_memory_that_is_mixed_in_adds_what_it_says_and_not_what_mixing_takes_away(mixing: str, scale: float) -> None:
    model = tiny.with_memory(tiny.build(), mixing=mixing, mix=0.7, scale=scale)
    ids = tiny.tokens(1, 10)
    assert torch.tensor(tradeoff(model, ids, [10]).values).min() > 0.01  # control
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".M"):
                parameter.zero_()
    assert torch.tensor(tradeoff(model, ids, [10]).values).max() < 1e-5


def test_the_tradeoff_of_another_method_is_refused() -> None:
    model = get_peft_model(tiny.build(), LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(PrefixMemoryError, match=r"method LORA.*spectrum"):
        tradeoff(model, tiny.tokens(), [4])


@pytest.mark.parametrize("lengths", [[0], [10]])
def test_lengths_beyond_the_text_are_refused(lengths: list[int]) -> None:
    with pytest.raises(PrefixMemoryError, match=f"lengths has {lengths[0]}, and the text has 9 tokens"):
        tradeoff(inside(), tiny.tokens(), lengths)


# The shift


def test_distance_of_distributions() -> None:
    a = torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]])
    b = torch.tensor([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    half = math.sqrt(0.5 * (math.log2(1 / 0.75) + 0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 / 0.25)))
    torch.testing.assert_close(js_distance(a, b).float(), torch.tensor([1.0, 0.0, half]))


def expected_shift(base: torch.Tensor, adapted: torch.Tensor) -> torch.Tensor:
    """By the definition, in NumPy's words: sqrt((KL(a, m) + KL(b, m)) / 2), mean over queries."""
    m = (base + adapted) / 2
    kl = [torch.where(x > 0, x * torch.log2(x / m), 0.0).sum(dim=-1) for x in (base, adapted)]
    return ((kl[0] + kl[1]) / 2).clamp(min=0).sqrt().mean(dim=(0, 2))


def test_shift_of_a_memory_is_that_of_the_eager_maps() -> None:
    model, ids = tiny.with_memory(tiny.build(attention="eager")), tiny.tokens(1, 12)
    found = shift(model, ids)
    with model.disable_adapter():
        base = eager_maps(model, ids)
    assert found.with_prefix is None
    assert found.distance[0] == [0.0] * 4  # nothing stands before the first layer's maps
    expected = expected_shift(base[1].double(), eager_maps(model, ids)[1].double())
    torch.testing.assert_close(torch.tensor(found.distance[1]).double(), expected, atol=1e-6, rtol=1e-4)
    assert min(found.distance[1]) > 1e-3


@pytest.mark.parametrize("make", [inside, peft_prefix])
def test_shift_of_a_prefix_with_and_without_its_key(make: object) -> None:
    model, ids = make(), tiny.tokens(1, 12)  # type: ignore[operator]
    found = shift(model, ids)
    with model.disable_adapter():
        base = eager_maps(model, ids)
    # over the input's keys alone the first layer's maps are the base model's: queries and keys are the same
    assert max(found.distance[0]) < 1e-3
    assert found.with_prefix is not None
    for layer, own, beside in zip(range(2), found.distance, found.with_prefix, strict=True):
        adapted = eager_maps(model, ids)[layer].double()
        share, rest = adapted[..., :5].sum(dim=-1, keepdim=True), adapted[..., 5:]
        before = base[layer].double()
        alone = expected_shift(before, rest / rest.sum(dim=-1, keepdim=True))
        torch.testing.assert_close(torch.tensor(own).double(), alone, atol=1e-3, rtol=1e-3)
        both = expected_shift(torch.nn.functional.pad(before, (1, 0)), torch.cat([share, rest], dim=-1))
        torch.testing.assert_close(torch.tensor(beside).double(), both, atol=1e-4, rtol=1e-3)
        assert min(beside) > 0.1


def test_no_shift_at_scale_zero() -> None:
    model, ids = tiny.with_memory(tiny.build(attention="sdpa")), tiny.tokens(1, 12)
    set_scale(model, 0.0)
    assert shift(model, ids).distance == [[0.0] * 4] * 2


def test_queries_are_sampled_evenly() -> None:
    model, ids = tiny.with_memory(tiny.build()), tiny.tokens(1, 101)
    found = shift(model, ids, queries=11)
    assert (found.tokens, found.queries) == (101, 11)
    whole = shift(model, ids, queries=101)
    torch.testing.assert_close(torch.tensor(found.distance[1]), torch.tensor(whole.distance[1]), rtol=0.5, atol=0)


def test_a_method_that_adds_tokens_has_no_shift() -> None:
    model = get_peft_model(tiny.build(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(PrefixMemoryError, match="PROMPT_TUNING adds tokens to the input"):
        shift(model, tiny.tokens())


def test_a_model_without_adapter_has_no_shift() -> None:
    with pytest.raises(PrefixMemoryError, match="LlamaForCausalLM has no adapter"):
        shift(tiny.build(), tiny.tokens())


def test_inputs_are_checked() -> None:
    model = tiny.with_memory(tiny.build())
    with pytest.raises(PrefixMemoryError, match="The text is empty"):
        shift(model, torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(PrefixMemoryError, match="513 tokens where the model reads at most 512"):
        shift(model, tiny.tokens(1, 513))


def test_modes_are_kept() -> None:
    model = tiny.with_memory(tiny.build())
    model.train()
    model.base_model.model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    tradeoff(model, tiny.tokens(1, 8), [8])
    shift(model, tiny.tokens(1, 8))
    assert [module.training for module in model.modules()] == before
