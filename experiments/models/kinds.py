"""The kinds of models that are walked: which types, which class builds them, what they are fed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from .tiny import START, build, tiny_config

Batch = dict[str, torch.Tensor]
SHORT, LONG, DECODER = 6, 12, 7  # tokens


@dataclass(frozen=True)
class Kind:
    """One kind of model.

    Attributes:
        auto_class: the Auto class that builds a model from its config.
        task_type: what PEFT is told; ``None`` where PEFT's own examples tell it nothing.
        names: the model types, with spaces between.
        inputs: ``(config, rows, length)`` to a batch.
        padding: side on which a row may be padded without changing its outputs; ``None``: not asked.
        generates: whether ``generate`` is asked for.
        prefix_task: what PEFT is told for prefix tuning, which works with a task only.
    """

    name: str
    auto_class: str
    task_type: str | None
    names: str
    inputs: Callable[[PreTrainedConfig, int, int], Batch]
    padding: str | None = None
    generates: bool = False
    prefix_task: str | None = None

    @property
    def types(self) -> tuple[str, ...]:
        return tuple(self.names.split())


def ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """Token ids that are special in no tiny config."""
    return torch.randint(8, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _text(config: PreTrainedConfig, rows: int, length: int) -> Batch:
    return {"input_ids": ids(rows, length), "attention_mask": torch.ones(rows, length, dtype=torch.long)}


def _text_or_codes(config: PreTrainedConfig, rows: int, length: int) -> Batch:
    codebooks = config.num_codebooks if config.model_type.startswith("musicgen") else 1
    return _text(config, rows, length) | {"input_ids": ids(rows * codebooks, length)}


def _decoder_ids(rows: int) -> torch.Tensor:
    return torch.cat([torch.full((rows, 1), START), ids(rows, DECODER - 1, seed=3)], dim=1)


def _two_texts(config: PreTrainedConfig, rows: int, length: int) -> Batch:
    return _text(config, rows, length) | {"decoder_input_ids": _decoder_ids(rows)}


def _sound_and_text(config: PreTrainedConfig, rows: int, length: int) -> Batch:
    sound = {
        "whisper": lambda: {"input_features": noise(rows, config.num_mel_bins, 2 * config.max_source_positions)},
        "speech_to_text": lambda: {"input_features": noise(rows, 40, config.input_feat_per_channel)},
        "moonshine": lambda: {"input_values": noise(rows, 5000)},
    }
    return sound[config.model_type]() | {"decoder_input_ids": _decoder_ids(rows)}


def _image(config: PreTrainedConfig, rows: int, length: int) -> Batch:
    vision = getattr(config, "vision_config", config)
    return {"pixel_values": noise(rows, vision.num_channels, vision.image_size, vision.image_size)}


def _waveform(config: PreTrainedConfig, rows: int, length: int) -> Batch:
    return {"input_values": noise(rows, 4000)}


CAUSAL_LM = Kind(
    "causal-lm",
    "AutoModelForCausalLM",
    "CAUSAL_LM",
    " ".join(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    _text_or_codes,
    padding="left",
    generates=True,
)
KINDS = (
    CAUSAL_LM,
    Kind(
        "encoders",
        "AutoModelForSequenceClassification",
        "SEQ_CLS",
        "bert roberta modernbert deberta deberta-v2 distilbert electra albert xlm-roberta camembert mpnet ernie "
        "megatron-bert roformer convbert mobilebert squeezebert rembert nystromformer longformer big_bird funnel "
        "layoutlm luke fnet",
        _text,
        padding="right",
    ),
    Kind(
        "encoder-decoders",
        "AutoModelForSeq2SeqLM",
        "SEQ_2_SEQ_LM",
        "t5 mt5 umt5 longt5 switch_transformers bart mbart pegasus marian blenderbot blenderbot-small m2m_100 "
        "plbart mvp led prophetnet bigbird_pegasus fsmt nllb-moe t5gemma",
        _two_texts,
        padding="right",
        generates=True,
    ),
    Kind(
        "speech-to-text",
        "AutoModelForSpeechSeq2Seq",
        None,
        "whisper speech_to_text moonshine",
        _sound_and_text,
        generates=True,
        prefix_task="SEQ_2_SEQ_LM",
    ),
    Kind(
        "vision",
        "AutoModelForImageClassification",
        None,
        "vit deit beit dinov2 dinov2_with_registers clip siglip swin swinv2 vit_msn ijepa",
        _image,
        prefix_task="FEATURE_EXTRACTION",
    ),
    Kind(
        "vision-language",
        "AutoModelForImageTextToText",
        "CAUSAL_LM",
        "llava llava_next llava_onevision qwen2_vl qwen2_5_vl qwen3_vl gemma3 paligemma idefics2 idefics3 smolvlm "
        "internvl mistral3 mllama aya_vision glm4v",
        _text,
        padding="left",
        generates=True,
    ),
    Kind(
        "speech",
        "AutoModelForCTC",
        None,
        "wav2vec2 hubert wavlm unispeech sew",
        _waveform,
        prefix_task="FEATURE_EXTRACTION",
    ),
)

#: Types whose class wants one part of their composite config.
PART = {
    (CAUSAL_LM.name, "musicgen"): "decoder",
    (CAUSAL_LM.name, "musicgen_melody"): "decoder",
}
#: Types that no tiny model can be run of, and why. What fails by itself gives its own reason.
NOT_RUN = {
    "gemma4_assistant": "a draft model that reads the keys and values of another model, it has no input of its own",
    "gemma4_unified_assistant": "a draft model that reads the keys and values of another model, it has no input of its "
    "own",
}
#: Arguments that a type wants besides its inputs.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "blt": {"use_cache": False},  # its config lacks what the cache asks for
}

#: Types whose reversible layers get no gradient unless their input has one, which frozen embeddings do not give it.
INPUTS_NEED_GRADIENTS = ("reformer",)


def by_name(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)


def kind_of(model_type: str) -> list[Kind]:
    """The kinds that have the type."""
    return [kind for kind in KINDS if model_type in kind.types]


def build_case(kind: Kind, model_type: str) -> PreTrainedModel:
    """The tiny model of one type as one kind."""
    config = tiny_config(model_type, decoder=kind is CAUSAL_LM)
    auto = getattr(transformers, kind.auto_class)
    model_class = auto._model_mapping[type(config)]
    if (part := PART.get((kind.name, model_type))) is not None:
        model = build(model_class._from_config, getattr(config, part))
    elif isinstance(model_class, tuple):  # of several heads, the first
        model = build(model_class[0]._from_config, config)
    else:
        model = build(auto.from_config, config)  # it takes the text part of a composite config where it must
    if model_type in INPUTS_NEED_GRADIENTS:
        model.enable_input_require_grads()
    return model
