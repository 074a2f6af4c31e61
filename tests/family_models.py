"""Tiny random models: one for each row of the tables of families, and for each family with something of its own."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from importlib import import_module

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

import tiny

SPECIAL = dict(vocab_size=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
PLAIN = dict(**SPECIAL, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
USUAL = dict(**PLAIN, intermediate_size=48)
GROUPED = dict(**USUAL, num_key_value_heads=2)
GPT = dict(vocab_size=128, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2)
BART = dict(
    **SPECIAL, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=32, decoder_ffn_dim=32, decoder_start_token_id=1,
)  # fmt: skip
T5 = dict(vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
LATENT = dict(
    **USUAL, num_key_value_heads=4, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6,
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1, n_shared_experts=1,
    first_k_dense_replace=1,
)  # fmt: skip
IMAGE = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=16)
PATCHES = dict(**IMAGE, patch_size=4)


@dataclass(frozen=True)
class Case:
    """A model, and what must be found in it: ``query`` and ``output`` paths, ``blocks``, by class of the core."""

    model_type: str
    model_class: str
    config: dict[str, object]
    found: dict[str, tuple[str, str, int]]
    mixes: bool = False  # a norm or a difference stands between the heads and the output projection


def lm(model_type: str, config: dict[str, object], core: str, query: str, output: str, blocks: int = 1, **more) -> Case:
    return Case(model_type, "AutoModelForCausalLM", config, {core: (query, output, blocks)}, **more)


def encoder(model_type: str, config: dict[str, object], core: str, query: str, output: str, blocks: int = 1) -> Case:
    return Case(model_type, "AutoModel", config, {core: (query, output, blocks)})


CASES = {
    "llama": lm("llama", GROUPED, "LlamaAttention", "q_proj", "o_proj"),
    "qwen3": lm("qwen3", GROUPED | dict(head_dim=12), "Qwen3Attention", "q_norm", "o_proj"),
    "qwen3_next": lm(
        "qwen3_next",
        GROUPED | dict(
            head_dim=8, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
            linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        ),
        "Qwen3NextAttention", "q_norm", "o_proj",
    ),
    "olmo": lm("olmo", GROUPED | dict(clip_qkv=0.5), "OlmoAttention", "q_proj", "o_proj"),
    "olmoe": lm(
        "olmoe", GROUPED | dict(clip_qkv=0.5, num_experts=4, num_experts_per_tok=2), "OlmoeAttention", "q_norm",
        "o_proj",
    ),
    "nanochat": lm("nanochat", GROUPED, "NanoChatAttention", "q_proj", "o_proj"),
    "hunyuan": lm(
        "hunyuan_v1_dense", GROUPED | dict(head_dim=8), "HunYuanDenseV1Attention", "q_proj", "o_proj"
    ),
    "stablelm": lm("stablelm", GROUPED | dict(qk_layernorm=True), "StableLmAttention", "q_layernorm", "o_proj"),
    "phi": lm("phi", GROUPED | dict(qk_layernorm=True), "PhiAttention", "q_layernorm", "dense"),
    "phi_plain": lm("phi", GROUPED, "PhiAttention", "q_proj", "dense"),
    "phi3": lm("phi3", GROUPED, "Phi3Attention", "qkv_proj", "o_proj"),
    "gpt_oss": lm(
        "gpt_oss", GROUPED | dict(head_dim=8, num_local_experts=4, num_experts_per_tok=2), "GptOssAttention", "q_proj",
        "o_proj",
    ),
    "gemma4": lm(
        "gemma4_text",
        GROUPED | dict(
            num_hidden_layers=2, head_dim=8, global_head_dim=12, layer_types=["sliding_attention", "full_attention"],
            vocab_size_per_layer_input=128, hidden_size_per_layer_input=8, num_kv_shared_layers=0,
            num_global_key_value_heads=1,
        ),
        "Gemma4TextAttention", "q_norm", "o_proj",
    ),
    "bitnet": lm("bitnet", GROUPED, "BitNetAttention", "q_proj", "o_proj", mixes=True),
    "diffllama": lm("diffllama", GROUPED, "DiffLlamaAttention", "q_proj", "o_proj", mixes=True),
    "llama4": lm(
        "llama4_text",
        GROUPED | dict(
            head_dim=8, intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=1, use_qk_norm=True
        ),
        "Llama4TextAttention", "q_proj", "o_proj",
    ),
    "deepseek_v3": lm("deepseek_v3", LATENT | dict(q_lora_rank=16), "DeepseekV3Attention", "q_b_proj", "o_proj"),
    "deepseek_v2": lm("deepseek_v2", LATENT | dict(q_lora_rank=None), "DeepseekV2Attention", "q_proj", "o_proj"),
    "axk2": lm("axk2", LATENT | dict(q_lora_rank=16), "AXK2Attention", "q_gate_proj", "o_proj", 4),
    "deepseek_v4": lm(
        "deepseek_v4",
        PLAIN | dict(
            num_key_value_heads=1, head_dim=16, q_lora_rank=16, o_lora_rank=16, o_groups=2, moe_intermediate_size=48,
            n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, index_n_heads=4, index_head_dim=8,
            layer_types=["sliding_attention"], mlp_layer_types=["moe"], sliding_window=6,
        ),
        "DeepseekV4Attention", "q_b_norm", "o_a_proj",
    ),
    "zaya": lm(
        "zaya",
        PLAIN | dict(
            num_key_value_heads=2, head_dim=8, moe_intermediate_size=48, num_experts=4, num_experts_per_tok=1,
            layer_types=["hybrid"], router_hidden_size=32,
        ),
        "ZayaAttention", "qk_norm", "o_proj",
    ),
    "muse_glimmer": encoder(
        "muse_glimmer_text", GROUPED | dict(head_dim=8, layer_types=["full_attention"], layer_rope_theta=[1e4]),
        "MuseGlimmerTextAttention", "qk_norm", "o_proj",
    ),
    "inkling2": lm(
        "inkling2_text",
        PLAIN | dict(
            num_key_value_heads=2, head_dim=8, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8,
            d_rel=4, rel_extent=16, layer_types=["hybrid_sliding"], moe_intermediate_size=48, n_routed_experts=4,
            num_experts_per_tok=2, sliding_window_size=6, qk_l2_clip_threshold=1.0, unpadded_vocab_size=128,
        ),
        "Inkling2SlidingAttention", "q_l2_clip", "o_proj",
    ),
    "gpt2": lm("gpt2", GPT, "GPT2Attention", "c_attn", "c_proj"),
    "openai-gpt": lm("openai-gpt", GPT, "Attention", "c_attn", "c_proj"),
    "imagegpt": Case("imagegpt", "ImageGPTModel", GPT, {"ImageGPTAttention": ("c_attn", "c_proj", 1)}),
    "gpt_bigcode": lm("gpt_bigcode", GPT | dict(multi_query=True), "GPTBigCodeAttention", "c_attn", "c_proj", 1),
    "gpt_bigcode_heads": lm("gpt_bigcode", GPT | dict(multi_query=False), "GPTBigCodeAttention", "c_attn", "c_proj", 4),
    "codegen": lm(
        "codegen", GPT | dict(n_embd=64, n_head=8, rotary_dim=4), "CodeGenAttention", "qkv_proj", "out_proj", 4
    ),
    "gptj": lm("gptj", GPT | dict(rotary_dim=4), "GPTJAttention", "q_proj", "out_proj"),
    "gpt_neo": lm(
        "gpt_neo",
        SPECIAL | dict(
            hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=6
        ),
        "GPTNeoSelfAttention", "q_proj", "out_proj",
    ),
    "gpt_neox": lm("gpt_neox", USUAL, "GPTNeoXAttention", "query_key_value", "dense", 4),
    "bloom": lm(
        "bloom", SPECIAL | dict(hidden_size=32, n_layer=1, n_head=4), "BloomAttention", "query_key_value", "dense", 4
    ),
    "persimmon": lm("persimmon", USUAL, "PersimmonAttention", "q_layernorm", "dense", 4),
    "falcon_multi_query": lm("falcon", PLAIN, "FalconAttention", "query_key_value", "dense", 1),
    "falcon_grouped": lm(
        "falcon", PLAIN | dict(new_decoder_architecture=True, num_kv_heads=2), "FalconAttention", "query_key_value",
        "dense", 2,
    ),
    "falcon_heads": lm(
        "falcon", PLAIN | dict(multi_query=False, alibi=True), "FalconAttention", "query_key_value", "dense", 4
    ),
    "mpt": lm(
        "mpt", dict(vocab_size=128, d_model=32, n_heads=4, n_layers=1, attn_config=dict(clip_qkv=0.5)), "MptAttention",
        "Wqkv", "out_proj",
    ),
    "dbrx": lm(
        "dbrx",
        dict(
            vocab_size=128, d_model=32, n_heads=4, n_layers=1,
            attn_config=dict(clip_qkv=0.5, kv_n_heads=2, rope_theta=1e4),
            ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2, hidden_size=32),
        ),
        "DbrxAttention", "Wqkv", "out_proj",
    ),
    "ctrl": lm("ctrl", GPT | dict(dff=48), "MultiHeadAttention", "Wq", "dense"),
    "xlm": lm(
        "xlm", dict(vocab_size=128, emb_dim=32, n_layers=1, n_heads=4, causal=True), "MultiHeadAttention", "q_lin",
        "out_lin",
    ),
    "cpmant": lm(
        "cpmant", PLAIN | dict(dim_head=8, dim_ff=48, prompt_length=4), "CpmAntAttention", "project_q",
        "attention_out",
    ),
    "opt": lm("opt", PLAIN | dict(ffn_dim=48, word_embed_proj_dim=32), "OPTAttention", "q_proj", "out_proj"),
    "moshi": lm("moshi", GROUPED | dict(ffn_dim=48, head_dim=8), "MoshiAttention", "q_proj", "o_proj"),
    "jetmoe": lm(
        "jetmoe", dict(**SPECIAL, hidden_size=32, num_hidden_layers=1, num_key_value_heads=2, kv_channels=8,
                       num_local_experts=4, num_experts_per_tok=2, intermediate_size=48),
        "JetMoeAttention", "experts.input_linear", "experts.output_linear",
    ),
    "reformer": lm(
        "reformer",
        dict(vocab_size=128, hidden_size=32, num_attention_heads=4, attention_head_size=8, feed_forward_size=48,
             attn_layers=["local"], axial_pos_embds=False, max_position_embeddings=64, is_decoder=True),
        "LocalSelfAttention", "self_attention.query", "output.dense",
    ),
    "reformer_lsh": lm(
        "reformer",
        dict(vocab_size=128, hidden_size=32, num_attention_heads=4, attention_head_size=8, feed_forward_size=48,
             attn_layers=["lsh"], axial_pos_embds=False, max_position_embeddings=64, is_decoder=True, num_hashes=1),
        "LSHSelfAttention", "self_attention.query_key", "output.dense",
    ),
    "modernbert": encoder("modernbert", USUAL, "ModernBertAttention", "Wqkv", "Wo"),
    "modernbert_decoder": lm("modernbert-decoder", USUAL, "ModernBertDecoderAttention", "q_proj", "Wo"),
    "bert": encoder("bert", USUAL, "BertSelfAttention", "self.query", "output.dense"),
    "roberta": encoder("roberta", USUAL, "RobertaSelfAttention", "self.query", "output.dense"),
    "big_bird": encoder("big_bird", USUAL, "BigBirdBlockSparseAttention", "self.query", "output.dense"),
    "albert": encoder("albert", USUAL | dict(embedding_size=16), "AlbertAttention", "query", "dense"),
    "distilbert": encoder(
        "distilbert", dict(vocab_size=128, dim=32, n_layers=1, n_heads=4, hidden_dim=48), "DistilBertSelfAttention",
        "q_lin", "out_lin",
    ),
    "mpnet": encoder("mpnet", USUAL, "MPNetSelfAttention", "q", "o"),
    "deberta": encoder(
        "deberta", USUAL | dict(relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=16),
        "DisentangledSelfAttention", "self.in_proj", "output.dense", 4,
    ),
    "deberta-v2": encoder(
        "deberta-v2",
        USUAL | dict(relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True, position_buckets=8),
        "DisentangledSelfAttention", "self.query_proj", "output.dense",
    ),
    "funnel": Case(
        "funnel", "FunnelModel",
        dict(
            vocab_size=128, d_model=32, n_head=4, d_head=8, d_inner=48, block_sizes=[1, 1], num_decoder_layers=1
        ),
        {"FunnelRelMultiheadAttention": ("q_head", "post_proj", 1)},
    ),
    "t5": Case("t5", "T5ForConditionalGeneration", T5, {"T5Attention": ("q", "o", 1)}),
    "bart": Case("bart", "BartForConditionalGeneration", BART, {"BartAttention": ("q_proj", "out_proj", 1)}),
    "prophetnet": Case(
        "prophetnet", "ProphetNetForConditionalGeneration",
        SPECIAL | dict(
            hidden_size=32, num_encoder_layers=1, num_decoder_layers=1, num_encoder_attention_heads=4,
            num_decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, ngram=2,
            decoder_start_token_id=1,
        ),
        {
            "ProphetNetAttention": ("query_proj", "out_proj", 1),
            "ProphetNetNgramSelfAttention": ("query_proj", "out_proj", 1),
        },
    ),
    "pix2struct": Case(
        "pix2struct_text_model", "Pix2StructTextModel", T5 | dict(hidden_size=32, initializer_range=0.02),
        {"Pix2StructTextAttention": ("query", "output", 1)},
    ),
    "bark": Case(
        "bark", "BarkSemanticModel",
        dict(block_size=64, input_vocab_size=128, output_vocab_size=128, num_layers=1, num_heads=4, hidden_size=32),
        {"BarkSelfAttention": ("att_proj", "out_proj", 1)},
    ),
    "lxmert": encoder(
        "lxmert", USUAL | dict(l_layers=1, x_layers=1, r_layers=1, visual_feat_dim=16), "LxmertAttention",
        "self.query", "output.dense",
    ),
    "internvl_vision": encoder(
        "internvl_vision", IMAGE | dict(image_size=[16, 16], patch_size=[4, 4], use_qk_norm=True),
        "InternVLVisionAttention", "q_norm", "projection_layer",
    ),
    "qwen2_vl_vision": Case(
        "qwen2_vl", "Qwen2VisionTransformerPretrainedModel",
        dict(depth=1, embed_dim=32, hidden_size=32, num_heads=4, patch_size=4),
        {"VisionAttention": ("qkv", "proj", 1)},
    ),
    "vit": encoder("vit", PATCHES, "ViTAttention", "q_proj", "o_proj"),
    "clip_vision": encoder("clip_vision_model", PATCHES, "CLIPAttention", "q_proj", "out_proj"),
    "blip_vision": Case("blip_vision_model", "BlipVisionModel", PATCHES, {"BlipAttention": ("qkv", "projection", 1)}),
    "sam_vision": Case(
        "sam_vision_model", "SamVisionModel",
        PATCHES | dict(global_attn_indexes=[0], window_size=0, output_channels=16, mlp_dim=48),
        {"SamVisionSdpaAttention": ("qkv", "proj", 1)},
    ),
    "timesformer": encoder(
        "timesformer", PATCHES | dict(num_frames=2), "TimesformerSelfAttention", "attention.qkv", "output.dense"
    ),
    "wav2vec2_conformer": encoder(
        "wav2vec2-conformer",
        dict(vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
             conv_dim=[8, 8], conv_stride=[5, 4], conv_kernel=[10, 8], num_conv_pos_embeddings=4,
             num_conv_pos_embedding_groups=2, num_feat_extract_layers=2, position_embeddings_type=None),
        "Wav2Vec2ConformerSelfAttention", "linear_q", "linear_out",
    ),
}  # fmt: skip


def build(case: Case) -> PreTrainedModel:
    """The model of a case, with sharp attention, and no parameter at a neutral start (biases, sinks, norms)."""
    torch.manual_seed(0)
    if hasattr(transformers, case.model_class):
        make = getattr(transformers, case.model_class)
    else:  # a part that is not public
        module = import_module(f"transformers.models.{case.model_type}.modeling_{case.model_type}")
        make = getattr(module, case.model_class)
    config_class = getattr(make, "config_class", None) or CONFIG_MAPPING[case.model_type]
    config = config_class(**copy.deepcopy(case.config))
    model = (make.from_config if hasattr(make, "from_config") else make)(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def inputs(case: Case) -> dict[str, Tensor]:
    """What the model of a case is run on: two rows."""
    text = {"input_ids": tiny.tokens(2, 10)}
    answers = {"decoder_input_ids": tiny.tokens(2, 8, seed=4)}
    special = {
        "lxmert": text | {"visual_feats": noise(2, 6, 16), "visual_pos": noise(2, 6, 4)},
        "timesformer": {"pixel_values": noise(2, 2, 3, 16, 16)},
        "wav2vec2-conformer": {"input_values": noise(2, 400)},
        "qwen2_vl": {"hidden_states": noise(16, 3 * 2 * 4 * 4), "grid_thw": torch.tensor([[1, 4, 4]])},
        "t5": text | answers,
        "bart": text | answers,
        "prophetnet": text | answers,
    }
    image = {"pixel_values": noise(2, 3, 16, 16)}
    return special.get(case.model_type, image if "image_size" in case.config else text)


def run(case: Case, model: torch.nn.Module) -> Tensor:
    """One forward pass; a tensor that depends on all of it."""
    outputs = model(**inputs(case))
    if case.model_type == "lxmert":
        return torch.cat([outputs.language_output, outputs.vision_output], dim=1)
    return outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state
