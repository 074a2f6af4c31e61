"""A tiny random model of any transformers type, from its config class alone: no files, no network.

``SMALL`` says how to shrink a field by its name, ``PER_TYPE`` what a type wants besides. What neither names keeps its
default, so that a type's own choices (norms, gates, caps, biases) stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any

import torch
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel

WIDTH, HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS, EXPERTS, TOP_K, VOCABULARY = 32, 4, 2, 8, 48, 2, 4, 2, 128
START = 2  # first token of a decoder

#: Sizes by the names of the fields that get them.
_SIZES = {
    "hidden_size d_model n_embd emb_dim embedding_dim embedding_size input_embedding_size output_embedding_size "
    "word_embed_proj_dim hidden_size_global lru_width pronunciation_embed_dim shape_embed_dim n_ctx adapter_in_dim "
    "adapter_out_dim out_hidden_size projector_input_dim projector_output_dim hidden_size_per_layer_input "
    "output_channels backbone_hidden_size router_hidden_size d_inner depthwise_separable_out_channel "
    "ext_pw_out_channel nemo_conv_channels adapter_input_size attention_hidden_size mlp_dim codebook_dim": WIDTH,
    "intermediate_size ffn_dim ffn_hidden_size encoder_ffn_dim decoder_ffn_dim d_ff dff n_inner dim_ff "
    "feed_forward_size moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "shared_experts_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size "
    "intermediate_size_mlp dense_intermediate_size": INNER,
    "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_heads "
    "linear_num_value_heads index_n_heads conf_num_attention_heads mamba_n_heads mamba_num_heads": HEADS,
    "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads": KV_HEADS,
    "head_dim attention_head_dim attention_head_size kv_channels d_kv d_head dim_head qk_nope_head_dim v_head_dim "
    "index_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim swa_head_dim mamba_d_head "
    "mamba_head_dim query_pre_attn_scalar global_head_dim": HEAD_DIM,
    "qk_rope_head_dim rotary_dim mamba_d_state ssm_state_size state_size time_step_rank mamba_dt_rank chunk_size "
    "mamba_chunk_size num_quantizers codebook_size num_mel_bins patch_size laurel_rank adapter_rank d_rel "
    "gated_norm_rank conf_attention_chunk_size image_seq_length num_centroids": 4,
    "q_lora_rank kv_lora_rank o_lora_rank hc_lowrank ple_embed_dim": 16,
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers depth num_blocks conf_num_hidden_layers num_global_layers num_layers_per_stack": LAYERS,
    "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num": EXPERTS,
    "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k n_groups top_k_experts": TOP_K,
    "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts "
    "num_nextn_predict_layers mamba_n_groups mamba_ngroups first_k_dense_replace num_dense_layers "
    "moe_layer_start_index": 1,
    "vocab_size decoder_vocab_size vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size "
    "audio_vocab_size ngram_vocab_size_base encoder_hash_byte_group_vocab": VOCABULARY,
    "max_position_embeddings n_positions max_seq_len max_source_positions max_target_positions": 64,
    "sliding_window sliding_window_size attention_window_size window_size local_attention attention_chunk_size": 6,
    "image_size": 16,
    "initializer_range init_std initializer_factor": 0.2,
    "mask_time_prob mask_feature_prob": 0.0,
}
#: How to shrink a field, by its name. A field whose default is ``None`` is left alone.
SMALL = {name: value for names, value in _SIZES.items() for name in names.split()}
#: Set also where the default is ``None``.
ALWAYS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
}


def tiny_config(model_type: str, decoder: bool) -> PreTrainedConfig:
    """The tiny config of a model type; ``decoder``: with a causal mask, of types that can be had with and without."""
    return _shrink(CONFIG_MAPPING[model_type], PER_TYPE.get(model_type, {}), decoder)


def _shrink(config_class: type[PreTrainedConfig], overrides: Mapping[str, Any], decoder: bool) -> PreTrainedConfig:
    overrides = dict(overrides)
    full = config_class()
    given: dict[str, Any] = {}
    for field in fields(config_class):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = decoder if field.name == "is_decoder" else _small(field.name, default)
        if value is not default:
            given[field.name] = value
    names = {field.name for field in fields(config_class)}
    if "kv_lora_rank" in names:
        given["num_key_value_heads"] = HEADS  # latent attention has one key per head
    for name in config_class.sub_configs:
        part = getattr(full, name, None)
        if (part is not None and name not in overrides) or isinstance(overrides.get(name), dict):
            part_class = type(part) if part is not None else config_class.sub_configs[name]
            wanted = {**PER_TYPE.get(part_class.model_type, {}), **overrides.pop(name, {})}
            given[name] = _shrink(part_class, wanted, decoder)
    lists = {name: value for name, value in _layer_kinds(full).items() if name in names}
    if lists and not lists.keys() & overrides.keys():
        given.update(lists)
        given["num_hidden_layers"] = len(next(iter(lists.values())))
    given.update(overrides)
    return config_class(**given)


def _small(name: str, default: Any) -> Any:
    if name in ALWAYS:
        return ALWAYS[name]
    if default is None or default is MISSING:
        return default
    if "dropout" in name or "pdrop" in name or name.endswith("layerdrop"):
        return 0.0 if isinstance(default, float) else default
    if name.endswith(("token_id", "token_index")) and isinstance(default, int):
        return default if default < VOCABULARY else 100 + sum(map(ord, name)) % 28
    value = SMALL.get(name, default)
    if isinstance(default, int) and not isinstance(default, bool) and isinstance(value, int | float):
        return int(value)
    return value if isinstance(default, int | float | str) else default


def _layer_kinds(full: PreTrainedConfig) -> dict[str, list[str]]:
    """Per-layer lists of kinds (attention, feed-forward) cut down to one layer of each kind, at least two layers."""
    layers = getattr(full, "num_hidden_layers", None)
    lists = {
        name: value
        for name, value in vars(full).items()
        if isinstance(value, list) and len(value) == layers and all(isinstance(v, str) for v in value)
    }
    if not lists:
        return {}
    seen: dict[str, set[str]] = {name: set() for name in lists}
    kept = []
    for index in range(layers):
        if any(value[index] not in seen[name] for name, value in lists.items()):
            kept.append(index)
            for name, value in lists.items():
                seen[name].add(value[index])
    if len(kept) < LAYERS:
        kept.append(layers - 1)
    return {name: [value[index] for index in kept] for name, value in lists.items()}


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_INDEXER = {
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8},
    **{"indexer_budget": 8, "indexer_compress_ratio": 2},
}
_SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 3, "image_size": 24}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}  # heads * size = expand * width

#: What a type wants besides: what its own validation asks for, and at least one layer of softmax attention in hybrids.
PER_TYPE: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
        "swa_head_dim": 12, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
    },
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "funnel": {"block_sizes": [2, 2]},
    "gemma3n_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "num_kv_shared_layers": 2},
    "glm4v_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4},  # of the rotary part
    "mamba2": {"num_heads": 8},
    "mobilebert": {"initializer_range": 0.02},  # it has no norms: greater weights saturate its pooler
    "moshi": {"num_codebooks": 2},
    "moshi_depth": {"num_codebooks": 2},
    "qwen2_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "qwen2_5_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 4},
    "speech_to_text": {"conv_channels": 16, "input_feat_per_channel": 4},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},  # it rounds its inner sizes up to 64
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def build(make: Callable[[PreTrainedConfig], PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model of ``config`` in fp32 and evaluation mode, always the same one.

    Parameters that start at zero (biases, gates) get small random values: a gate at zero would hide what lies behind.
    """
    torch.manual_seed(0)
    model = make(copy.deepcopy(config)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    model.generation_config = GenerationConfig(
        pad_token_id=0, bos_token_id=1, decoder_start_token_id=START, use_cache=True
    )
    return model
