"""Memories in feed-forward blocks: where they stand, what they add, and from which token on.

The oracle knows the modules of each family by their names, and computes base and memory by itself.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import (
    AutoModelForSeq2SeqLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    NllbMoeConfig,
    SwitchTransformersConfig,
    Zamba2Config,
    Zamba2ForCausalLM,
)

import family_models
import tiny
from family_models import CASES, run
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError, calibrate, reference, set_scale
from prefixmemory.attention.discovery import find_sites
from prefixmemory.attention.feed_forward import find_feed_forward
from prefixmemory.training.silent_front import SilentFront
from prefixmemory.tuner.conversion import kernel_from_prefix, memory_from_prefix
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
    # experts of matrices that are no tensor of three axes
    "dbrx": ["ffn"],
    "jetmoe": ["mlp"],
    "xlm": ["lin1", "lin2"],  # a list of blocks beside one of attentions
}
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
            answer = answer if limit is None else reference.limited(answer[:, None], own[:, None], limit)[:, 0]
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


@pytest.mark.parametrize("family", CASES)
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


def test_experts_that_are_a_block_by_themselves_stand_beside_the_other_block():
    fields = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
    case = dataclasses.replace(CASES["gemma4"], config=CASES["gemma4"].config | fields)
    model = family_models.build(case)
    names = [name.split(".", 3)[3] for name in find_feed_forward(model, find_sites(model)) if "layers.0." in name]
    assert names == ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "experts"]
    adapted = with_both(model)
    with torch.no_grad():
        whole = run(case, adapted)
        for name, layer in in_blocks(adapted).items():
            layer.set_scale("default", 0.0)
            assert not torch.equal(run(case, adapted), whole), name
            layer.set_scale("default", 1.0)


def test_layers_that_are_feed_forward_alone_have_them_where_no_layer_is_both():
    config = NemotronHConfig(
        vocab_size=128, hidden_size=32, layers_block_type=["linear_attention", "full_attention", "mlp"], head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, ssm_state_size=4, mamba_num_heads=4,
        mamba_head_dim=8, n_groups=2, chunk_size=4,
    )  # fmt: skip
    model = NemotronHForCausalLM(config).eval()
    adapted = with_both(model)
    assert [name.rpartition("model.")[2] for name in in_blocks(adapted)] == [
        "layers.2.mixer.up_proj", "layers.2.mixer.down_proj",
    ]  # fmt: skip
    ids = tiny.tokens()
    whole = logits(adapted, ids)
    for layer in in_blocks(adapted).values():
        layer.set_scale("default", 0.0)
        assert not torch.equal(logits(adapted, ids), whole)
        layer.set_scale("default", 1.0)


def test_a_models_own_adapters_are_no_projections():
    config = Zamba2Config(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, layers_block_type=["mamba", "hybrid"], num_mem_blocks=1,
        num_attention_heads=4, num_key_value_heads=4, intermediate_size=48, mamba_d_state=8, mamba_headdim=16,
        n_mamba_heads=4, mamba_ngroups=1, adapter_rank=4,
    )  # fmt: skip
    model = Zamba2ForCausalLM(config)
    names = list(find_feed_forward(model, find_sites(model)))
    assert names and not any("adapter" in name for name in names)


def test_a_model_whose_blocks_are_not_known_is_refused():
    model = tiny.build()
    for layer in model.model.layers:
        layer.mlp = nn.Identity()
    with pytest.raises(PrefixMemoryError, match="feed_forward=4 finds no feed-forward projection"):
        get_peft_model(model, PrefixMemoryConfig(feed_forward=4))


def test_only_what_is_asked_for():
    assert not in_blocks(tiny.with_memory(tiny.build(), rank=8))
    chosen = with_both(tiny.build(), target_modules=["self_attn", "down_proj"], layers_to_transform=[1])
    assert list(in_blocks(chosen)) == ["base_model.model.model.layers.1.mlp.down_proj"]
    refused = {
        r"Name some of \['down_proj', 'gate_proj', 'up_proj'\] there too": {"target_modules": ["self_attn"]},
        "exclude_modules=.* leaves none": {"exclude_modules": GATED},
        "matches no attention module": {"target_modules": ["down_proj"]},
        "layers_to_transform=.* matches no attention": {"layers_to_transform": [7]},
        "trains .*0.mlp.down_proj' in full": {"modules_to_save": ["down_proj"]},
        "trains .*0.mlp.gate_proj' in full": {"modules_to_save": ["mlp"]},
        r"attention or feed-forward modules, here \['down_proj', 'gate_proj', 'self_attn', 'up_proj'\]": {
            "target_modules": ["self_attn", "mlp"]
        },
        "no rank: a memory in a feed-forward block has two factors": {"rank_pattern": {"up_proj": None}},
        "fits no module that gets a memory": {"rank_pattern": {"nowhere": 3}},
        "feed_forward_limit=-1": {"feed_forward_limit": -1.0},
        "feed_forward_limit=0.3 needs feed_forward": {"feed_forward": None, "feed_forward_limit": 0.3},
    }
    for words, fields in refused.items():
        with pytest.raises(PrefixMemoryError, match=words):
            with_both(tiny.build(), **fields)
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


def test_heads_speak_more_softly_than_the_blocks():
    """By a factor that is the default beside blocks, and that stays when the scale changes."""
    assert PrefixMemoryConfig(feed_forward=4).head_scale == 0.25
    assert PrefixMemoryConfig().head_scale == PrefixMemoryConfig(feed_forward=4, mixing="head").head_scale == 1
    assert PrefixMemoryConfig(feed_forward=4, head_scale=0.5).head_scale == 0.5
    for fields in ({"head_scale": 0.5, "placement": "inside", "prefix_length": 4}, {"head_scale": 0.0}):
        with pytest.raises(PrefixMemoryError, match="head_scale"):
            PrefixMemoryConfig(**fields)
    ids = tiny.tokens()
    soft, loud = (with_both(tiny.build(), **fields) for fields in ({}, {"head_scale": 1.0}))
    said = {}
    for scale in (1.0, 2.0):
        set_scale(soft, scale)
        set_scale(loud, scale)
        said[scale] = loud(ids).logits
        for layer in memory_layers(loud):
            if not isinstance(layer, InFeedForward):
                layer.set_scale("default", 0.25 * scale)
        assert torch.equal(soft(ids).logits, loud(ids).logits)
        assert (soft(ids).logits - said[scale]).abs().max() > 1e-3
    soft.base_model.add_weighted_adapter(["default"], [1.0], "sum")
    before = soft(ids).logits
    soft.set_adapter("sum")
    assert torch.equal(soft(ids).logits, before)


# --- what -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.5, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_oracles(family, limit):
    """Memories in blocks alone: those in heads are silenced, other tests know them."""
    model = with_both(tiny.build(family), feed_forward_limit=limit)
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


def test_tokens_that_cannot_be_told_apart_are_refused():
    model = with_both(tiny.build())
    projection = model.base_model.model.model.layers[0].mlp.up_proj
    with (
        pytest.raises(PrefixMemoryError, match="reads 3 tokens of 2 rows"),
        model.base_model._enable_peft_forward_hooks(adapter_names=["default", "__base__"]),
    ):
        projection(torch.zeros(3, 32))
    with pytest.raises(PrefixMemoryError, match="given other by keyword"):
        in_blocks(model)["base_model.model.model.layers.0.mlp.up_proj"]._add_output(
            projection, (), {"other": torch.zeros(1, 2, 32)}, torch.zeros(1, 2, 48)
        )


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


def test_its_limit_is_its_own():
    for fields in ({"output_limit": None}, {"mixing": "head"}, {"placement": "inside", "prefix_length": 3}):
        assert PrefixMemoryConfig(feed_forward=4, **fields).of_module("mlp", in_feed_forward=True).output_limit == 0.5
    config = PrefixMemoryConfig(feed_forward=4, feed_forward_limit=None)
    assert config.of_module("mlp", in_feed_forward=True).output_limit is None and config.output_limit == 0.5


def test_a_projection_that_is_replaced_is_missed():
    model = with_both(tiny.build())
    ids, block = tiny.tokens(), model.base_model.model.model.layers[0].mlp
    block.up_proj = copy.deepcopy(tiny.build().model.layers[0].mlp.up_proj)
    for use in (lambda: logits(model, ids), lambda: model.save_pretrained("/nowhere")):
        with pytest.raises(PrefixMemoryError, match="up_proj of LlamaMLP was replaced"):
            use()
    base = model.unload()
    assert torch.equal(logits(base, ids), logits(tiny.build(), ids))


def test_lora_that_is_taken_away_from_around_it_is_missed():
    lora = get_peft_model(tiny.build(), LoraConfig(target_modules=["down_proj"]))
    with pytest.warns(UserWarning, match="multiple adapters"):
        inject_adapter_in_model(PrefixMemoryConfig(feed_forward=4), lora.base_model.model, "memory")
    assert len(in_blocks(lora)) == 6
    merged = lora.merge_and_unload()
    with pytest.raises(PrefixMemoryError, match="down_proj of LlamaMLP was replaced"):
        logits(merged, tiny.tokens())


SPARSE = {
    "switch": SwitchTransformersConfig(
        vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, num_decoder_layers=2, num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0, router_jitter_noise=0.0,
    ),
    "nllb": NllbMoeConfig(
        vocab_size=128, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_experts=4, encoder_sparse_step=2,
        decoder_sparse_step=2, pad_token_id=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPARSE)
def test_rows_with_adapters_of_their_own_get_them_beside_experts_too(kind):
    """Within an expert, nobody could say whose its tokens are."""
    torch.manual_seed(0)
    adapted = AutoModelForSeq2SeqLM.from_config(SPARSE[kind]).eval()
    config = PrefixMemoryConfig(task_type="SEQ_2_SEQ_LM", feed_forward=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of cross attention, which gets none
        adapted = get_peft_model(adapted, config)
        adapted.add_adapter("b", dataclasses.replace(config))
    for seed, name in enumerate(("default", "b"), start=2):
        tiny.randomize(adapted, name, seed=seed)
    adapted.eval()
    assert not any(".expert_" in name for name in in_blocks(adapted))
    batch = {"input_ids": tiny.tokens(2, 9), "decoder_input_ids": tiny.tokens(2, 5)}
    with torch.no_grad():
        both = adapted(**batch, adapter_names=["default", "b"]).logits
        for row, name in enumerate(("default", "b")):
            own = {key: value[[row]] for key, value in batch.items()}
            alone, other = (
                adapted(**own, adapter_names=[each]).logits for each in (name, "b" if not row else "default")
            )
            torch.testing.assert_close(both[[row]], alone, atol=1e-5, rtol=0)
            assert (alone - other).abs().max() > 1e-3


def test_where_no_layer_has_a_block_those_beside_its_model_are_no_layers():
    model = tiny.build()
    for layer in model.model.layers:
        layer.mlp = nn.Identity()
    model.model.connector = nn.ModuleDict({"mlp": nn.Linear(32, 32)})
    model.fc_head = nn.Linear(32, 4)
    assert not find_feed_forward(model, find_sites(model))


def test_a_tower_with_blocks_does_not_hide_the_layers_of_another():
    """Nemotron-H's beside a vision tower's: each model by itself."""
    model = tiny.build()
    model.tower = tiny.build().model
    for number, layer in enumerate(model.model.layers):
        if number % 2:
            layer.self_attn = nn.Identity()
        else:
            layer.mlp = nn.Identity()
    found = find_feed_forward(model, find_sites(model))
    assert {name.split(".")[0] for name in found} == {"model", "tower"}
    assert [name for name in found if name.startswith("model.")] == [f"model.layers.1.mlp.{name}" for name in GATED]


def test_a_block_with_a_list_of_experts_has_one_as_a_whole():
    """Each expert reads the tokens that chose it: their places in the batch are lost."""

    class Experts(nn.Module):
        def __init__(self, plain: nn.Module) -> None:
            super().__init__()
            self.gate, self.experts = nn.Linear(32, 2), nn.ModuleList([plain, copy.deepcopy(plain)])

    model = tiny.build()
    for layer in model.model.layers:
        layer.mlp = Experts(layer.mlp)
    found = find_feed_forward(model, find_sites(model))
    assert {name: (site.reads, site.returns) for name, site in found.items()} == {
        f"model.layers.{i}.mlp": (32, 32) for i in range(len(model.model.layers))
    }


def test_an_adapter_without_them_makes_none():
    model = with_both(tiny.build())
    tensors = {name: p for name, p in model.named_parameters() if "default" in name}
    bare = {name.removeprefix("base_model.model.").replace(".default", ""): p for name, p in tensors.items()}
    with pytest.raises(PrefixMemoryError, match=r"not a softmax attention: .* with feed_forward"):
        inject_adapter_in_model(PrefixMemoryConfig(), tiny.build(), "other", state_dict=bare)


@pytest.mark.parametrize("placement", ["inside", "outside"])
def test_a_converted_adapter_keeps_its_limit(placement):
    model = tiny.with_memory(tiny.build(), placement=placement, prefix_length=3, feed_forward=4)
    kernel_from_prefix(model, "default", "kernel")
    for layer in in_blocks(model).values():
        assert layer.configs["kernel"].output_limit == layer.configs["default"].output_limit == 0.5
        assert torch.equal(layer.memory("kernel").B, layer.memory("default").B)


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
