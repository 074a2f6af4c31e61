"""Memories in feed-forward blocks: where they stand, what they add, and from which token on.

The oracle knows the modules of each family by their names, and computes base and memory by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

import family_models
import tiny
from family_models import CASES, run
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError, calibrate, reference, set_scale
from prefixmemory.attention.discovery import find_sites
from prefixmemory.attention.feed_forward import find_feed_forward
from prefixmemory.rows.collator import collator
from prefixmemory.serving.served import why_not
from prefixmemory.training.silent_front import SilentFront
from prefixmemory.tuner.conversion import memory_from_prefix
from prefixmemory.tuner.in_feed_forward import InFeedForward
from prefixmemory.tuner.layers import memory_layers
from test_activation import INVOKED, naive, text
from test_silent_front import batch_for, gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:transformers", "ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]

GATED = ["gate_proj", "up_proj", "down_proj"]
#: The feed-forward modules of the last layer, by the ends of their names.
FOUND = {
    **dict.fromkeys(["llama", "qwen3", "gemma4", "deepseek_v3", "bitnet", "muse_glimmer"], GATED),
    "phi3": ["gate_up_proj", "down_proj"],
    "gpt2": ["c_fc", "c_proj"],
    "gptj": ["fc_in", "fc_out"],
    "gpt_neox": ["dense_h_to_4h", "dense_4h_to_h"],
    "mpt": ["up_proj", "down_proj"],
    "opt": ["fc1", "fc2"],
    "bart": ["fc1", "fc2"],
    "t5": ["DenseReluDense.wi", "DenseReluDense.wo"],
    "pix2struct": ["wi_0", "wi_1", "wo"],
    "bert": ["intermediate.dense", "output.dense"],
    "albert": ["ffn", "ffn_output"],
    "modernbert": ["Wi", "Wo"],
    "axk2": GATED,  # not the network in a norm
    # experts in one tensor, with and without others beside them
    "olmoe": ["mlp"],
    "gpt_oss": ["mlp"],
    "qwen3_next": ["mlp"],
    "deepseek_v4": ["mlp"],
    "llama4": ["feed_forward"],
}
#: Their experts are lists of matrices, or their layers hold lists of blocks.
NOT_FOUND = ("dbrx", "xlm", "jetmoe")
#: Modules of the oracle: rotary and learned positions, a gate or none, biases, one projection for two.
FAMILIES = {
    **dict.fromkeys(["llama", "llama_gqa", "qwen2", "qwen3", "gemma2", "gemma3", "mistral"], GATED),
    "phi3": ["gate_up_proj", "down_proj"],
    "gpt2": ["c_fc", "c_proj"],
    "gpt_neox": ["dense_h_to_4h", "dense_4h_to_h"],
}


def with_both(model: nn.Module, std: float = 0.3, **config: object) -> PeftModel:
    """Memories in heads and feed-forward blocks."""
    adapted = tiny.with_memory(model, **{**tiny.DEFAULT, "feed_forward": 4, **config})
    tiny.randomize(adapted, std=std)
    return adapted


def in_blocks(model: nn.Module) -> dict[str, InFeedForward]:
    return {
        name.removesuffix(".prefix_memory"): layer
        for name, layer in model.named_modules()
        if isinstance(layer, InFeedForward)
    }


@contextmanager
def oracle(
    model: nn.Module, factors: dict[str, tuple[Tensor, Tensor]], limit: float | None, active: Tensor
) -> Iterator[None]:
    """``model``, a base model, with x·A·B added to what the modules named in ``factors`` return."""
    plain = {}

    def added(module: nn.Module, a: Tensor, b: Tensor):
        def forward(x: Tensor) -> Tensor:
            own = plain[module](x)
            answer = x @ a @ b
            answer = answer if limit is None else reference.limited(answer, own, limit)
            return own + answer * active[..., None]

        return forward

    for name, (a, b) in factors.items():
        module = model.get_submodule(name)
        plain[module] = module.forward
        module.forward = added(module, a, b)
    try:
        yield
    finally:
        for module in plain:
            del module.forward


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **given: object) -> Tensor:
    return model(input_ids=ids, use_cache=False, **given).logits


def factors_of(model: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    start = "base_model.model."
    return {
        name.removeprefix(start): (layer.memory("default").A[0], layer.memory("default").B[0])
        for name, layer in in_blocks(model).items()
    }


# --- where ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FOUND)
def test_the_projections_of_the_blocks_are_found_and_no_others(family):
    model = family_models.build(CASES[family])
    names = list(find_feed_forward(model, find_sites(model)))
    last = names[-len(FOUND[family]) :]
    assert all(name.endswith(end) for name, end in zip(last, FOUND[family], strict=True)), names
    assert not any(word in name for name in names for word in ("attn.", "attention.", "router", "norm"))


@pytest.mark.parametrize("family", [name for name in CASES if name not in NOT_FOUND])
def test_each_of_them_counts_and_unload_leaves_nothing(family):
    model = family_models.build(CASES[family])
    with torch.no_grad():
        before = run(CASES[family], model)
        names, hooks = [name for name, _ in model.named_modules()], sum(len(m._forward_hooks) for m in model.modules())
        adapted = get_peft_model(model, PrefixMemoryConfig(feed_forward=3)).eval()
        torch.testing.assert_close(run(CASES[family], adapted), before, rtol=0, atol=0)  # B is zero
        layers = in_blocks(adapted)
        assert len(layers) >= 1
        for layer in layers.values():
            nn.init.normal_(layer.memory("default").B)
        whole = run(CASES[family], adapted)
        for name, layer in layers.items():
            layer.set_scale("default", 0.0)
            assert not torch.equal(run(CASES[family], adapted), whole), name
            layer.set_scale("default", 1.0)
        set_scale(adapted, 0.0)
        torch.testing.assert_close(run(CASES[family], adapted), before, rtol=0, atol=0)
        bare = adapted.unload()
        torch.testing.assert_close(run(CASES[family], bare), before, rtol=0, atol=0)
    assert [name for name, _ in bare.named_modules()] == names
    assert sum(len(m._forward_hooks) for m in bare.modules()) == hooks


@pytest.mark.parametrize("family", NOT_FOUND)
def test_a_model_whose_blocks_are_not_known_is_refused(family):
    with pytest.raises(PrefixMemoryError, match="feed_forward=4 finds no feed-forward projection"):
        get_peft_model(family_models.build(CASES[family]), PrefixMemoryConfig(feed_forward=4))


def test_only_what_is_asked_for():
    assert not in_blocks(tiny.with_memory(tiny.build(), rank=8))
    chosen = with_both(tiny.build(), target_modules=["self_attn", "down_proj"], layers_to_transform=[1])
    assert list(in_blocks(chosen)) == ["base_model.model.model.layers.1.mlp.down_proj"]
    with pytest.raises(PrefixMemoryError, match=r"name \['down_proj', 'gate_proj', 'up_proj'\] there too"):
        with_both(tiny.build(), target_modules=["self_attn"])
    with pytest.raises(PrefixMemoryError, match="no softmax attention"):
        tiny.with_memory(tiny.build(), target_modules=["self_attn", "down_proj"])
    with pytest.raises(PrefixMemoryError, match="feed_forward"):
        PrefixMemoryConfig(feed_forward=0)


def test_patterns_by_name():
    model = with_both(
        tiny.build(), rank_pattern={"down_proj": 2}, output_limit_pattern={"1.mlp.up_proj": None},
        scale_pattern={"gate_proj": 0.5},
    )  # fmt: skip
    layers = in_blocks(model)
    assert {name.rpartition(".")[2]: layer.memory("default").rank for name, layer in layers.items()} == {
        "gate_proj": 4,
        "up_proj": 4,
        "down_proj": 2,
    }
    limits = [layer.configs["default"].output_limit for name, layer in layers.items() if name.endswith("up_proj")]
    assert limits == [0.5, None]
    assert {layer.scale["default"] for name, layer in layers.items() if name.endswith("gate_proj")} == {0.5}


# --- what -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.5, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_oracles(family, limit):
    """Memories in blocks alone: those in heads are silenced, other tests know them."""
    model = with_both(tiny.build(family), output_limit=limit)
    blocks = in_blocks(model)
    assert {name.rpartition(".")[2] for name in blocks} == set(FAMILIES[family])
    for layer in memory_layers(model):
        if layer not in blocks.values():
            layer.set_scale("default", 0.0)
    base, ids = tiny.build(family), tiny.tokens(2, 9)
    with oracle(base, factors_of(model), limit, torch.ones(2, 9)):
        expected = logits(base, ids)
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)
    assert (logits(tiny.build(family), ids) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_it_speaks_from_its_invocation_on(family):
    model = with_both(tiny.build(family), **INVOKED)
    for layer in memory_layers(model):
        if not isinstance(layer, InFeedForward):
            layer.set_scale("default", 0.0)
    base, ids = tiny.build(family), torch.cat([text(2, 5), text(9)])
    mask = naive(ids)
    with oracle(base, factors_of(model), 0.5, mask):
        expected = logits(base, ids)
    found, silent = logits(model, ids), logits(base, ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(found[~mask], silent[~mask])
    with oracle(base, factors_of(model), 0.5, naive(ids).roll(1, dims=1)):  # one token later is something else
        assert (logits(base, ids) - found).abs().max() > 1e-3


def test_a_block_that_reads_all_tokens_in_one_row_knows_where_to_speak():
    """OPT's first projection is given [batch · tokens, features] in some releases; here it is made so."""
    model = with_both(tiny.build(), **INVOKED)
    ids = torch.cat([text(2, 5), text(9)])
    expected = logits(model, ids)
    by_row = logits(model, ids, adapter_names=["default", "__base__"])
    for layer in model.base_model.model.model.layers:
        block, plain = layer.mlp, layer.mlp.forward
        block.forward = lambda x, plain=plain: plain(x.flatten(0, 1)).view(x.shape)
    torch.testing.assert_close(logits(model, ids), expected)
    torch.testing.assert_close(logits(model, ids, adapter_names=["default", "__base__"]), by_row)
    assert not torch.allclose(by_row[1], expected[1])


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2", "phi3"])
def test_generation_reads_as_one_pass_does(family):
    model = with_both(tiny.build(family), **INVOKED, std=2.0)
    prompt = torch.cat([text(2, 5), text(9)])
    new = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    greedy = logits(model, new)[:, prompt.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(new[:, prompt.shape[1] :], greedy)
    assert (logits(model, new) - logits(tiny.build(family), new))[:, -6:].abs().max() > 0.01


# --- with others ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2", "phi3"])
def test_rows_have_adapters_of_their_own(family):
    model = with_both(tiny.build(family))
    model.add_adapter("other", PrefixMemoryConfig(feed_forward=4))
    tiny.randomize(model, "other", seed=7)
    model.add_adapter("heads", PrefixMemoryConfig())
    tiny.randomize(model, "heads", seed=8)
    names = ["other", "__base__", "default", "heads", "other"]
    ids = tiny.tokens(len(names), 9)
    found = logits(model, ids, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = logits(model, ids[row : row + 1])
        else:
            model.set_adapter(name)
            expected = logits(model, ids[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], expected, rtol=0, atol=1e-4)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model, ids = with_both(tiny.build(), **INVOKED), torch.cat([text(2, 5), text(9)])
    model.save_pretrained(tmp_path)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(tiny.build(), tmp_path, low_cpu_mem_usage=low).eval()
        assert torch.equal(logits(loaded, ids), logits(model, ids))
        assert len(in_blocks(loaded)) == len(in_blocks(model)) == 6
    with pytest.raises(PrefixMemoryError, match="feed_forward is 4 there and None here"):
        tiny.with_memory(tiny.build(), **tiny.DEFAULT, **INVOKED).load_adapter(tmp_path, "default")


def test_lora_may_stand_around_it():
    model = with_both(tiny.build())
    ids, before = tiny.tokens(), logits(model, tiny.tokens())
    with pytest.warns(UserWarning, match="multiple adapters"):
        around = inject_adapter_in_model(LoraConfig(target_modules=["down_proj"]), model.base_model.model, "lora")
    torch.testing.assert_close(logits(around, ids), before)


def test_a_converted_adapter_keeps_it():
    fields = {
        "prefix_length": 3,
        "similarity": "feature_map",
        "rank": "auto",
        "output_limit": None,
        "normalize": "auto",
    }
    model = with_both(tiny.build(), **fields)
    before = logits(model, tiny.tokens())
    memory_from_prefix(model, "default", "free")
    model.set_adapter("free")
    torch.testing.assert_close(logits(model, tiny.tokens()), before, rtol=0, atol=1e-4)


def test_the_silent_front_is_read_without_gradients_too():
    model = with_both(tiny.build(), **INVOKED).train()
    batch = batch_for(model)
    calibrate(model, **batch)
    rest = SilentFront(model).read(batch)
    assert "past_key_values" in rest
    (loss, expected), (same, found) = gradients(model, batch), gradients(model, rest)
    assert same == pytest.approx(loss, abs=1e-5) and found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()))


def test_it_learns_where_it_speaks():
    model = with_both(tiny.build(), **INVOKED).train()
    model.gradient_checkpointing_enable()
    ids = torch.cat([text(2, 5), text(9)])
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in tiny.memory_parameters(model).items():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert collator(model, tiny.tokenizer()) is not None


def test_a_server_refuses_it_for_now():
    assert "feed_forward=4" in (why_not(PrefixMemoryConfig(feed_forward=4)) or "")
    assert why_not(PrefixMemoryConfig()) is None
