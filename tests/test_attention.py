"""Finding attention: families that are laid out otherwise are refused, what gets no memory is named."""

import copy
import logging
from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    BltConfig,
    BltForCausalLM,
    CLIPVisionModel,
    ConvBertConfig,
    GenerationConfig,
    JetMoeConfig,
    Lfm2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LongformerConfig,
    LukeConfig,
    MambaConfig,
    MLCDVisionConfig,
    SqueezeBertConfig,
    T5Config,
    T5ForConditionalGeneration,
    WavLMConfig,
    WhisperConfig,
    WhisperForConditionalGeneration,
    XLNetConfig,
)
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention

import tiny
from close import close_logits, same_parameters
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError, set_scale

SMALL = dict(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
SMALL_IMAGE = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
)  # fmt: skip
SMALL_SPEECH = dict(
    intermediate_size=48, conv_dim=[8, 8], conv_stride=[5, 4], conv_kernel=[10, 8], num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2, num_feat_extract_layers=2,
)  # fmt: skip
T5 = T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
WHISPER = WhisperConfig(
    vocab_size=128, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=4, max_source_positions=16,
    max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
LLAVA = LlavaConfig(
    text_config=dict(model_type="llama", **SMALL, intermediate_size=48),
    vision_config=dict(model_type="clip_vision_model", **SMALL_IMAGE),
    image_token_id=1, image_seq_length=4, vision_feature_layer=-1,
)  # fmt: skip


def logits(model, ids=None):
    with torch.no_grad():
        return model(tiny.tokens() if ids is None else ids).logits


class UnknownAttention(GPTNeoXAttention):
    """Has the children of GPT-NeoX, and may lay them out in any way."""


class BypassedAttention(nn.Module):
    """Uses the weights of its output projection, and does not call it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 8
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        return F.linear(heads, self.o_proj.weight, self.o_proj.bias)


def test_a_fused_projection_of_an_unknown_class_is_refused_rather_than_read_wrongly():
    model = tiny.build("gpt_neox")
    for layer in model.gpt_neox.layers:
        layer.attention.__class__ = UnknownAttention
    with pytest.raises(PrefixMemoryError, match="UnknownAttention has no query projection that is known among "):
        get_peft_model(model, PrefixMemoryConfig())


@pytest.mark.parametrize("width", [{"num_attention_heads": 2}, {"head_size": 6}])
def test_widths_that_do_not_agree_are_refused(width):
    model = tiny.build("gpt_neox")
    for layer in model.gpt_neox.layers:
        for name, value in width.items():
            setattr(layer.attention, name, value)
    with pytest.raises(PrefixMemoryError, match="laid out otherwise than is known"):
        get_peft_model(model, PrefixMemoryConfig())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (XLNetConfig(vocab_size=128, d_model=32, n_layer=1, n_head=4, d_inner=48), "its projections are parameters"),
        (LongformerConfig(**SMALL, intermediate_size=48, attention_window=4), "its global tokens have a query"),
        (LukeConfig(**SMALL, intermediate_size=48, entity_vocab_size=9), "words and entities have query projections"),
        (ConvBertConfig(**SMALL, intermediate_size=48), "a convolution stands beside its heads"),
        (SqueezeBertConfig(**SMALL, intermediate_size=48, embedding_size=32), "its features stand before its tokens"),
        (MLCDVisionConfig(**SMALL_IMAGE, num_key_value_groups=1), "reads tokens and rows the other way round"),
        (WavLMConfig(**SMALL, **SMALL_SPEECH), "one fused function"),
        (MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1, state_size=4), "MambaModel has no softmax"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_what_cannot_be_read_is_refused_with_the_reason(config, reason):
    with pytest.raises(PrefixMemoryError, match=reason):
        get_peft_model(AutoModel.from_config(config), PrefixMemoryConfig())


@pytest.mark.parametrize("module", [nn.MultiheadAttention(32, 4), nn.MultiheadAttention(32, 4, kdim=16, vdim=16)])
def test_torchs_own_attention_is_refused_when_it_is_named(module):
    model = nn.Sequential(OrderedDict(attention=BypassedAttention(), fused=module))
    with pytest.raises(PrefixMemoryError, match="which is no softmax attention"):
        inject_adapter_in_model(PrefixMemoryConfig(target_modules=["fused"]), model)


def test_a_memory_that_is_passed_by_is_an_error_and_the_base_model_is_not():
    x = torch.randn(2, 5, 32)
    model = nn.Sequential(OrderedDict(attention=BypassedAttention()))
    before = model(x)
    model = inject_adapter_in_model(PrefixMemoryConfig(), model)
    with pytest.raises(PrefixMemoryError, match="its memory was passed by"):
        model(x)
    model.attention.prefix_memory.enable_adapters(False)
    assert torch.equal(model(x), before)


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


def test_every_side_and_kind_of_attention_of_an_encoder_decoder_can_be_named(caplog):
    def targeted(**config):
        return get_peft_model(T5ForConditionalGeneration(T5), PrefixMemoryConfig(**config)).targeted_module_names

    encoder, decoder = (
        [f"{side}.block.{i}.layer.0.SelfAttention" for i in range(2)] for side in ("encoder", "decoder")
    )
    cross = [f"decoder.block.{i}.layer.1.EncDecAttention" for i in range(2)]
    with caplog.at_level(logging.WARNING, logger="prefixmemory"):
        assert targeted() == encoder + decoder
    assert [r.getMessage() for r in caplog.records] == [f"No memory in {name}: cross attention." for name in cross]
    assert targeted(target_modules=["EncDecAttention"]) == cross
    assert targeted(target_modules=r"encoder.*SelfAttention") == encoder
    assert targeted(target_modules=r"decoder.*Attention") == [
        name for pair in zip(decoder, cross, strict=True) for name in pair
    ]


def test_a_vision_language_model_gets_its_memory_in_the_text_part_unless_another_is_named(caplog):
    with caplog.at_level(logging.WARNING, logger="prefixmemory"):
        text = get_peft_model(LlavaForConditionalGeneration(LLAVA), PrefixMemoryConfig())
    assert text.targeted_module_names == [f"model.language_model.layers.{i}.self_attn" for i in range(2)]
    assert [r.getMessage() for r in caplog.records] == [
        "No memory in model.vision_tower: not in the text part of the model; name its attention in target_modules."
    ]
    config = PrefixMemoryConfig(target_modules=r".*vision_tower.*self_attn")
    vision = get_peft_model(LlavaForConditionalGeneration(LLAVA), config)
    assert all("vision_tower" in name for name in vision.targeted_module_names)
    alone = get_peft_model(CLIPVisionModel(LLAVA.vision_config), PrefixMemoryConfig())
    assert len(alone.targeted_module_names) == 2


@pytest.mark.parametrize(
    ("make", "config", "target", "count"),
    [
        (T5ForConditionalGeneration, T5, "EncDecAttention", 2),
        (T5ForConditionalGeneration, T5, r"encoder.*SelfAttention", 2),
        (WhisperForConditionalGeneration, WHISPER, r".*encoder\.layers.*self_attn", 2),
        (WhisperForConditionalGeneration, WHISPER, None, 4),
        (LlavaForConditionalGeneration, LLAVA, None, 2),
        (LlavaForConditionalGeneration, LLAVA, r".*vision_tower.*self_attn", 2),
    ],
)  # fmt: skip
def test_the_chosen_attention_trains_and_nothing_else_changes(make, config, target, count):
    ids = tiny.tokens()
    image = torch.full((2, 4), LLAVA.image_token_id)
    batch = {
        "t5": {"input_ids": ids, "labels": ids},
        "whisper": {"input_features": torch.randn(2, 4, 32), "labels": ids},
        "llava": {
            "input_ids": torch.cat([image, ids], dim=1),
            "labels": torch.cat([image, ids], dim=1),
            "pixel_values": torch.randn(2, 3, 16, 16),
        },
    }[config.model_type]
    torch.manual_seed(0)
    target = target if target is None or "." in target else [target]
    model = get_peft_model(make(config).eval(), PrefixMemoryConfig(target_modules=target))
    start = {name: parameter.clone() for name, parameter in model.named_parameters()}
    memories = tiny.memory_parameters(model)
    assert len(memories) == 2 * count  # A and B
    optimizer = torch.optim.AdamW(memories.values(), lr=0.02)
    losses = []
    for _ in range(5):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        if not name.endswith(".mean"):  # of the first batch
            assert torch.equal(parameter, start[name]) == (name not in memories), name


def test_a_rotated_query_reaches_a_memory_that_hangs_one_module_up():
    bert = BertModel(BertConfig(**SMALL, intermediate_size=48)).eval()  # does not rotate: both queries are the same
    ids = tiny.tokens()
    outputs = {}
    for query in ("content", "rotary"):
        base = copy.deepcopy(bert)
        before = base(ids).last_hidden_state
        model = get_peft_model(base, PrefixMemoryConfig(query=query)).eval()
        tiny.randomize(model)
        assert model.targeted_module_names == [f"encoder.layer.{i}.attention" for i in range(2)]
        outputs[query] = model(ids).last_hidden_state
        twin = copy.deepcopy(model)
        same_parameters(twin, model)
        close_logits(twin(ids).last_hidden_state, outputs[query])
        assert torch.equal(model.unload()(ids).last_hidden_state, before)
    assert torch.allclose(outputs["content"], outputs["rotary"], atol=1e-6)
    assert (outputs["rotary"] - bert(ids).last_hidden_state).abs().max() > 1e-2


def test_a_part_that_no_gradient_reaches_is_left_alone():
    small = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, intermediate_size=48
    )
    parts = ("patcher_config", "encoder_config", "decoder_config", "global_config")
    config = BltConfig(
        **{part: dict(small, vocab_size=260) for part in parts}, vocab_size=260, encoder_hash_byte_group_vocab=64,
        cross_attn_k=1,
    )  # fmt: skip
    names = get_peft_model(BltForCausalLM(config), PrefixMemoryConfig()).targeted_module_names
    assert len(names) == 3
    assert not any("patcher" in name for name in names)


@pytest.mark.filterwarnings("ignore::UserWarning:transformers")  # old configs speak of their generation settings
def test_experts_that_project_queries_are_read_row_by_row_and_a_rotated_query_is_refused():
    config = JetMoeConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=1, num_key_value_heads=2, kv_channels=8, num_local_experts=4,
        num_experts_per_tok=2, intermediate_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    assert torch.isfinite(logits(tiny.with_memory(copy.deepcopy(model)))).all()
    with pytest.raises(PrefixMemoryError, match="use query='content'"):
        logits(tiny.with_memory(model, query="rotary"))


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
    twin = copy.deepcopy(model)
    same_parameters(twin, model)
    close_logits(logits(twin), logits(model))


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
    in_memory = logits(model)
    disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    before = logits(model)
    close_logits(before, in_memory)
    adapted = get_peft_model(model, PrefixMemoryConfig())
    assert {p.device.type for p in tiny.memory_parameters(adapted).values()} == {"cpu"}
    assert torch.equal(logits(adapted), before)
