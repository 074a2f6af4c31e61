"""Quantised base models: what ``quantization=`` means, and what keeps gradients flowing through a 4-bit base."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import nn

from prefixmemory.errors import PrefixMemoryError, check_choice

Quantization = Literal["bnb-4bit", "bnb-8bit", "torchao-int8"]

#: The package that each choice needs.
PACKAGES: dict[Quantization, str] = {
    "bnb-4bit": "bitsandbytes",
    "bnb-8bit": "bitsandbytes",
    "torchao-int8": "torchao",
}


def check_quantization(quantization: object) -> None:
    """Refuse an unknown choice, and one whose package is not installed.

    Raises:
        PrefixMemoryError: either of the two.
    """
    check_choice("quantization", quantization, get_args(Quantization))
    package = PACKAGES[quantization]  # type: ignore[index]
    if find_spec(package) is None:
        raise PrefixMemoryError(
            f"quantization={quantization!r} needs {package}, which is not installed. "
            "Install it with `pip install 'prefixmemory[quantized]'`."
        )


def quantization_config(quantization: Quantization, compute_dtype: torch.dtype) -> Any:
    """What transformers' ``from_pretrained`` wants for a choice.

    Args:
        quantization: ``bnb-4bit`` is QLoRA's (NF4 in blocks of 64, scales quantised once more), ``bnb-8bit``
            is LLM.int8() (int8 weights, and int8 activations except for outliers), ``torchao-int8`` int8 weights with
            one scale per output feature.
        compute_dtype: the dtype in which unpacked 4-bit weights are multiplied.
    """
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if quantization == "bnb-4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    if quantization == "bnb-8bit":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_news)
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


_said: set[str] = set()


def _is_news(record: logging.LogRecord) -> bool:
    """Let a message of bitsandbytes through once; LLM.int8() repeats one at every matrix product."""
    message = record.getMessage()
    news = message not in _said
    _said.add(message)
    return news


def with_trainable_kernels(config: Any) -> Any:
    """The config of a checkpoint that is saved quantised, asking for kernels that have a gradient.

    GPTQ and AWQ are computed by gptqmodel, whose fastest kernels only answer.
    """
    if config.quantization_config["quant_method"] in ("gptq", "awq"):
        config.quantization_config["backend"] = "auto_trainable"
    return config


# bitsandbytes (0.49 to 0.50) on a CPU with AVX512-BF16: the first forward pass in evaluation mode replaces the 4-bit
# weights by repacked ones, rounds their scales to bfloat16, and multiplies from then on without a gradient
# (Linear4bit.forward, matmul_4bit). Training after a look at the base model, or after Trainer's first evaluation, would
# learn nothing.

REPACKS = "support_avx512bf16_for_cpu"  # the attribute of a Linear4bit by which it decides


def set_repacking(model: nn.Module, allowed: bool) -> None:
    """Forbid or allow bitsandbytes to repack 4-bit weights for inference on a CPU; elsewhere nothing happens.

    Loading with :func:`prefixmemory.models.loading.load_model` and attaching a memory forbid it. Allow it on a model
    that only answers: single tokens are then many times faster on CPUs with AVX512-BF16, and logits change by the
    rounding of the scales. What is repacked stays so.
    """
    modules = [module for module in model.modules() if hasattr(module, REPACKS)]
    if modules and allowed:
        from bitsandbytes.functional import has_avx512bf16

        allowed = has_avx512bf16()
    for module in modules:
        setattr(module, REPACKS, allowed)


def is_repacked(module: nn.Module) -> bool:
    """Whether bitsandbytes has repacked the weight of ``module`` for inference on a CPU."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def keep_trainable(model: nn.Module, inference: bool) -> None:
    """Forbid repacking; refuse to train on a model that has been repacked already.

    Raises:
        PrefixMemoryError: ``model`` holds repacked weights and is not for inference only.
    """
    repacked = [name for name, module in model.named_modules() if is_repacked(module)]
    if repacked and inference:
        return  # as it answered before
    if repacked:
        raise PrefixMemoryError(
            f"No gradient passes through {len(repacked)} 4-bit projections ({repacked[0]!r} for one): bitsandbytes "
            "repacked them for inference when the base model was first evaluated on this CPU. Load the base model "
            "again and attach the memory before its first forward pass, or load it with "
            "prefixmemory.models.loading.load_model, which prevents the repacking."
        )
    set_repacking(model, allowed=False)
