"""How model families write their attention: the tables that ``discovery.py`` matches against live modules.

A row says where something lies; the widths of the live modules must agree with it, else the module is refused. Class
names are given as regular expressions that the name must begin with, for children that mean different things in
different families. How to add a family: CONTRIBUTING.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class QueryProjection:
    """Where a family computes its query.

    Attributes:
        path: name of the projection, dotted, from the module that computes the attention.
        blocks: what the projection returns is this many equal parts, each beginning with the queries of its
            heads: 1 (all queries first), ``heads`` (one part per head), ``kv_heads`` (one part per group), or a number.
        beside: what else it returns.
        classes: which attention classes the row is for.
        bias: name of a parameter ``[heads * head_dim]`` that is added to the query after the projection.
        heads: name of the attribute that counts the heads, where it is not one of ``HEADS``.
        output: name of the output projection, where it is not one of ``OUTPUT_PROJECTIONS``.
    """

    path: str
    blocks: int | Literal["heads", "kv_heads"] = 1
    beside: Literal["nothing", "keys and values", "gate"] = "nothing"
    classes: str = ""
    bias: str = ""
    heads: str = ""
    output: str = ""


@dataclass(frozen=True)
class QueryNorm:
    """A child that normalises the query between projection and rotation; ``but`` names classes where it does not, and
    ``tokens_first`` says that it sees ``[.., T, H, D]`` in storage of its own, not a view of the projection's rows."""

    child: str
    classes: str = ""
    but: str = "(?!)"  # matches nothing
    tokens_first: bool = False


_QKV: Literal["keys and values"] = "keys and values"

#: The first row that fits counts.
QUERY_PROJECTIONS = (
    QueryProjection("q_b_proj"),  # latent attention (DeepSeek) with a low-rank query
    QueryProjection("q_proj"),  # Llama and most others
    QueryProjection("q_attn"),  # GPT-2, cross attention
    QueryProjection("query"),  # BERT, ViT, ...
    QueryProjection("q"),  # T5, MPNet
    QueryProjection("q_lin"),  # DistilBERT, XLM
    QueryProjection("query_proj"),  # DeBERTa v2, ProphetNet
    QueryProjection("linear_q"),  # conformers
    QueryProjection("q_head", classes="Funnel"),
    QueryProjection("project_q", classes="CpmAnt"),
    QueryProjection("query_key", classes="LSHSelfAttention"),  # Reformer: one vector serves as query and key
    QueryProjection("Wq", classes="MultiHeadAttention"),  # CTRL
    QueryProjection("qkv_proj", 1, _QKV, "Phi3|Phi4"),
    QueryProjection("c_attn", 1, _QKV, "GPT2|DecisionTransformerGPT2|ImageGPT|Attention$"),  # the last is OpenAI GPT
    QueryProjection("Wqkv", 1, _QKV, "ModernBert|Mpt|Dbrx"),
    QueryProjection("att_proj", 1, _QKV, "Bark"),
    QueryProjection(
        "qkv", 1, _QKV, r"\w*Vision(Sdpa)?Attention|Blip|InstructBlip|PPOCR|Mgpstr|SegGpt|VitDet|Timesformer"
    ),
    QueryProjection("query_key_value", "heads", _QKV, "GPTNeoX|Bloom|Persimmon"),
    QueryProjection("query_key_value", "kv_heads", _QKV, "Falcon"),
    QueryProjection("c_attn", "kv_heads", _QKV, "GPTBigCode"),
    QueryProjection("qkv_proj", 4, _QKV, "CodeGen"),  # laid out for four devices
    QueryProjection("in_proj", "heads", _QKV, "DisentangledSelfAttention", bias="q_bias"),  # DeBERTa v1
    QueryProjection("q_gate_proj", "heads", "gate", "AXK2"),
    QueryProjection("qkv_proj.q_proj", classes="Zaya"),
    # The heads of each chosen expert; both projections see their rows in the same order, sorted by expert.
    QueryProjection(
        "experts.input_linear", classes="JetMoe", heads="num_key_value_heads", output="experts.output_linear"
    ),
)
#: Where there is one, the query is read behind it: [.., T, H, D], [.., H, T, D], flat, or first of a tuple.
QUERY_NORMS = (
    # NanoChat and TimesFM normalise behind the rotation, BLT before the projection.
    QueryNorm("q_norm", but="NanoChat|TimesFm2_5|BltCross"),
    QueryNorm("q_layernorm"),
    QueryNorm("q_b_norm", "DeepseekV4"),
    QueryNorm("q_l2_clip", "Inkling2"),
    QueryNorm("qk_norm", "Zaya", tokens_first=True),  # a convolution stands in front
    QueryNorm("qk_norm", "MuseSpark|MuseGlimmer"),  # called for the query first; Llama 4's is behind the rotation
)
#: Names of the output projection, from the module that holds it; the first that is there counts.
OUTPUT_PROJECTIONS = (
    *("o_proj", "out_proj", "c_proj", "o_a_proj", "dense", "out_lin", "linear_out", "o", "Wo", "attention_out"),
    *("proj", "projection", "projection_layer", "post_proj", "output.dense", "output"),
)
#: Children that compute the attention of a module that has only the output projection itself (BERT's ``self``).
CORES = ("self", "attention", "self_attention", "att")

KEYS = ("k_proj", "key", "k", "k_lin", "key_proj", "linear_k", "project_k", "Wk")
VALUES = ("v_proj", "value", "v", "v_lin", "value_proj", "linear_v", "project_v", "Wv")
HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "num_attn_heads")
KV_HEADS = ("kv_heads", "num_kv_heads", "num_key_value_heads")
HEAD_DIMS = (
    *("qk_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_head"),
    *("qk_channels_per_head",),
)
VALUE_DIMS = ("v_head_dim", "v_channels_per_head")
#: What the factor on q·k is called; where there is none, it is the head dimension to the power of -1/2.
SCALINGS = ("scaling", "softmax_scale")
#: Attention whose scores are q·k as they are.
UNSCALED = re.compile("GPTNeoSelf|LongT5")
CROSS_ATTENTION_NAMES = (
    *("encoder_attn", "crossattention", "cross_attn", "cross_attention", "EncDecAttention"),
    "encoder_decoder_attention",
)

#: Class names of attention, and of attention without a softmax.
ATTENTION = re.compile(r"Attention(?!Residual|DecoderLayer)|MLA$")
NOT_SOFTMAX = re.compile(r"Delta|Lightning|Yoso|(?<!^Kimi)Linear(Self)?Attention")
#: Attention that cannot be read, or not rightly, by its class or by an attribute that gives it away.
REFUSED = {
    "in_proj_weight": "it hands its weights to one fused function, so that no projection is called",  # torch's own
    "WavLM": "it hands its weights to one fused function, so that no projection is called",
    "query_global": "its global tokens have a query projection of their own",  # Longformer, LED
    "PegasusXGlobalLocal": "it attends twice, from global and from local tokens, in an order of its own",
    "w2e_query": "words and entities have query projections of their own",  # LUKE
    "linear_q_adapter_list": "it adds an adapter to the query after the projection",  # Zamba2
    "ConvBert": "a convolution stands beside its heads before the output projection",
    "SqueezeBert": "its features stand before its tokens",
    "MLCD": "its output projection reads tokens and rows the other way round",
}
#: Fields of a config that make the model one with parts beside its text part.
CONFIGS_OF_OTHER_PARTS = ("vision_config", "audio_config", "codec_config", "protein_encoder_config")
#: Parts of models that no gradient reaches, by their class.
NO_GRADIENT = {"BltPatcher": "it only decides where patches end, so that no gradient reaches it"}
#: Attention that repeats all its key heads, in order, for each expert of a token.
HEADS_OF_EACH_EXPERT = re.compile("JetMoe")
#: Attention whose keys or values reach its attention function otherwise than its projections made them.
NO_PREFIX_INSIDE = {"DiffLlama": "each half of its value heads goes through a softmax of its own"}
