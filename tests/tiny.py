"""Tiny randomly initialised models of the families, a tokenizer, and small helpers for the tests."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from prefixmemory import PrefixMemoryConfig

VOCABULARY = 128
_COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_GQA = dict(num_key_value_heads=2)

#: The parameters of an adapter, by their names.
IN_ADAPTER = re.compile(r"\.prefix_memory_(bank|mixing)\.ADAPTER\.")

#: What makes the memory of ``with_memory`` the default one.
DEFAULT = {name: getattr(PrefixMemoryConfig(), name) for name in ("rank", "output_limit", "normalize")}

#: Config of each family by the name that the tests use.
CONFIGS = {
    "llama": LlamaConfig(**_COMMON),
    "llama_gqa": LlamaConfig(**_COMMON, **_GQA),
    "qwen2": Qwen2Config(**_COMMON, **_GQA),
    "qwen3": Qwen3Config(**_COMMON, **_GQA, head_dim=12),  # head_dim is not hidden_size / heads
    "gemma2": Gemma2Config(**_COMMON, **_GQA, head_dim=12, query_pre_attn_scalar=12, sliding_window=6),
    "gemma3": Gemma3TextConfig(**_COMMON, **_GQA, head_dim=12, query_pre_attn_scalar=12, sliding_window=6),
    "mistral": MistralConfig(**_COMMON, **_GQA, sliding_window=6),
    "phi3": Phi3Config(**_COMMON, **_GQA),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "gpt_neox": GPTNeoXConfig(**_COMMON, rotary_pct=0.5),
}  # fmt: skip


def build(family: str = "llama_gqa", attention: str | None = None, seed: int = 0) -> PreTrainedModel:
    """A random model of ``family``, in evaluation mode, fp32; ``attention`` as in ``attn_implementation``."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]), attn_implementation=attention)
    return model.float().eval()


def tokens(rows: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    """Random token ids without special tokens, ``[rows, length]``."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def with_memory(model: PreTrainedModel, fill: bool = True, **config: object) -> PeftModel:
    """``model`` with a memory, in the paper's form but for ``config``; ``fill``: random contents, as if trained."""
    plain = {"rank": None, "output_limit": None, "normalize": "none"}
    adapted = get_peft_model(model, PrefixMemoryConfig(task_type="CAUSAL_LM", **{**plain, **config}))
    if fill:
        randomize(adapted)
    return adapted.eval()


def randomize(model: PeftModel, adapter: str = "default", seed: int = 2, std: float = 0.3) -> None:
    """Random contents for the parameters of one adapter, and for the mean that its memory subtracts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if IN_ADAPTER.search(name.replace(f".{adapter}.", ".ADAPTER.")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def memory_parameters(model: PeftModel, adapter: str = "default") -> dict[str, torch.nn.Parameter]:
    """What one adapter trains, by name."""
    found = {n: p for n, p in model.named_parameters() if IN_ADAPTER.search(n.replace(f".{adapter}.", ".ADAPTER."))}
    return {n: p for n, p in found.items() if not n.endswith(".mean")}


def means(model: PeftModel, adapter: str = "default") -> dict[str, torch.nn.Parameter]:
    """What one adapter subtracts from its features, by name."""
    return {n: p for n, p in model.named_parameters() if n.endswith(f".prefix_memory_bank.{adapter}.mean")}


def save_tiny(folder: Path, family: str = "llama_gqa", seed: int = 0) -> Path:
    """Save a tiny model and tokenizer, as a user's base model on disk."""
    build(family, seed=seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def talker(seed: int = 0) -> PreTrainedModel:
    """A base model that writes different texts for different prompts."""
    model = build(seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
        model.lm_head.weight[len(tokenizer()) :] = 0
    return model


def reads(folder: Path, tokens: int) -> None:
    """Let a saved model read as many tokens as that."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": tokens}))


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters, with a chat template if asked for."""
    characters = [chr(c) for c in range(32, 127)] + ["\n"]
    names = ["<pad>", "<bos>", "<eos>", "<unk>", "<|user|>", "<|assistant|>"]
    vocabulary = {token: i for i, token in enumerate(names + characters)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    if chat:
        fast.chat_template = (
            "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<eos>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
        )
    return fast
