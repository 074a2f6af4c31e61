"""Finding attention: families that are laid out otherwise are refused, what gets no memory is named."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    CodeGenConfig,
    FalconConfig,
    GenerationConfig,
    GPTBigCodeConfig,
    Lfm2Config,
)

import tiny
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError, set_scale

SMALL = dict(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
SMALL_GPT = dict(vocab_size=128, n_embd=32, n_layer=2, n_head=4)


def logits(model, ids=None):
    with torch.no_grad():
        return model(tiny.tokens() if ids is None else ids).logits


@pytest.mark.parametrize(
    "config",
    [
        FalconConfig(**SMALL),  # one key and value for all heads, in a projection that GPT-NeoX lays out per head
        FalconConfig(**SMALL, new_decoder_architecture=True, num_kv_heads=2),  # grouped
        GPTBigCodeConfig(**SMALL_GPT, multi_query=False),  # c_attn per head, where GPT-2 has three blocks
        CodeGenConfig(**SMALL_GPT, rotary_dim=4),  # qkv_proj in blocks of its own
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # old configs speak of their generation settings
def test_a_fused_projection_that_is_laid_out_otherwise_is_refused_rather_than_read_wrongly(config):
    with pytest.raises(PrefixMemoryError, match="no softmax self-attention that prefixmemory knows"):
        get_peft_model(AutoModelForCausalLM.from_config(config), PrefixMemoryConfig())


def test_a_declared_number_of_heads_that_the_projection_does_not_have_is_refused():
    model = tiny.build("llama")
    for layer in model.model.layers:
        layer.self_attn.num_heads = 2  # the projections have 4 heads of this head_dim
    with pytest.raises(PrefixMemoryError, match="no softmax self-attention"):
        get_peft_model(model, PrefixMemoryConfig())


def test_a_layer_without_attention_is_named(caplog):
    config = Lfm2Config(
        **SMALL, intermediate_size=48, num_key_value_heads=2, layer_types=["conv", "full_attention"],
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="prefixmemory"):
        model = get_peft_model(AutoModelForCausalLM.from_config(config), PrefixMemoryConfig())
    assert model.targeted_module_names == ["model.layers.1.self_attn"]
    assert [r.getMessage() for r in caplog.records if r.name.startswith("prefixmemory")] == [
        "No memory in model.layers.0: Lfm2DecoderLayer has no softmax attention that is known."
    ]


@pytest.mark.parametrize("query", ["content", "rotary"])
def test_cross_attention_is_left_alone_unless_named(query):
    config = BartConfig(
        vocab_size=128, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32,
    )  # fmt: skip
    ids = tiny.tokens()
    by_default = get_peft_model(BartForConditionalGeneration(config), PrefixMemoryConfig(query=query))
    assert not any("encoder_attn" in name for name in by_default.targeted_module_names)
    model = BartForConditionalGeneration(config).eval()
    before = model(ids, decoder_input_ids=ids).logits
    named = tiny.with_memory(model, target_modules=["encoder_attn"], query=query)
    assert named.targeted_module_names == ["model.decoder.layers.0.encoder_attn"]
    assert (named(ids, decoder_input_ids=ids).logits - before).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # what this test does on purpose
def test_lora_after_a_memory_is_refused_and_lora_before_it_is_read():
    def lora(model):
        config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        torch.manual_seed(3)
        return inject_adapter_in_model(config, model)

    late = tiny.with_memory(tiny.build())
    lora(late.base_model.model)
    with pytest.raises(PrefixMemoryError, match="inject LoRA first"):
        logits(late)

    with_lora = lora(tiny.build())
    alone = logits(with_lora)
    both = inject_adapter_in_model(PrefixMemoryConfig(), with_lora, adapter_name="memory")
    assert torch.equal(logits(both), alone)  # zero start on top of LoRA
    tiny.randomize(both, "memory")
    assert (logits(both) - alone).abs().max() > 1e-2


def test_a_broken_off_forward_pass_does_not_stand_in_the_way_of_a_copy():
    model = tiny.with_memory(tiny.build())
    handle = model.base_model.model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tiny.tokens())
    handle.remove()
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


@pytest.mark.parametrize("normalize", ["query_rms", "feature_l2"])
def test_norms_of_large_queries_do_not_overflow_in_half_precision(normalize):
    model = tiny.with_memory(tiny.build(), normalize=normalize)
    memory = model.base_model.model.model.layers[0].self_attn.prefix_memory.memory("default")
    query = 300 * torch.randn(2, 5, 4, 8)
    whole = memory(query)
    half = memory.half()(query.half())
    assert whole.abs().max() > 0.1
    assert torch.allclose(half.float(), whole, rtol=0.05, atol=0.02)


def test_set_scale_refuses_what_it_cannot_do():
    with pytest.raises(PrefixMemoryError, match="holds no memory"):
        set_scale(tiny.build(), 0.5)
    with pytest.raises(PrefixMemoryError, match="scale=nan is out of range"):
        set_scale(tiny.with_memory(tiny.build()), float("nan"))


def test_the_fingerprint_is_the_base_models_also_beside_trained_embeddings(tmp_path):
    with pytest.warns(UserWarning, match="tie_word_embeddings"):  # PEFT, of any trained embedding
        config = PrefixMemoryConfig(modules_to_save=["embed_tokens"])
        model = get_peft_model(tiny.build("gemma2"), config, adapter_name="other")
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.modules_to_save["other"].weight.mul_(-1.0)
    model.add_adapter("plain", PrefixMemoryConfig())
    model.save_pretrained(tmp_path, selected_adapters=["plain"])
    PeftModel.from_pretrained(tiny.build("gemma2"), tmp_path / "plain")  # not refused


def test_beams_may_come_from_the_models_own_generation_settings():
    model = tiny.with_memory(tiny.build())
    model.base_model.model.generation_config.num_beams = 3
    settings = GenerationConfig(max_new_tokens=4, pad_token_id=0)
    rows = model.generate(tiny.tokens(), generation_config=settings, adapter_names=["default", "__base__"])
    with model.disable_adapter():
        base = model.generate(tiny.tokens(), generation_config=settings)
    assert torch.equal(rows[1], base[1])


def test_a_base_model_that_accelerate_keeps_elsewhere_gets_its_memory_where_it_computes(tmp_path):
    from accelerate import disk_offload

    model = tiny.build()
    before = logits(model)
    disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    adapted = get_peft_model(model, PrefixMemoryConfig())
    assert {p.device.type for p in tiny.memory_parameters(adapted).values()} == {"cpu"}
    assert torch.equal(logits(adapted), before)
