"""A tiny base model, memories of different kinds and a LoRA for it, and what transformers answers with each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from prefixmemory import PrefixMemoryConfig, set_scale
from tiny import VOCABULARY, randomize, tokenizer

#: Tokens from whose last occurrence on the activated memories speak.
INVOCATION = (5, 6, 7)
BASE = "base"

#: One memory of each kind that matters to a server: feature map, query, rank, limit, sharing, activation.
MEMORIES: dict[str, dict[str, Any]] = {
    "default": {},
    "rotary": {"query": "rotary", "feature_map": "gelu", "rank": 3, "output_limit": None, "scale": 0.5},
    "shared": {"share_heads": True, "feature_map": "silu", "normalize": "feature_l2", "rank": 5},
    "activated": {"active_from": "invocation", "invocation_tokens": list(INVOCATION), "output_limit": 0.8},
}
#: With memories in feed-forward blocks too, and a LoRA on the same projections.
BLOCKS: dict[str, dict[str, Any]] = {
    "blocks": {"feed_forward": 8},
    "blocks, activated": {
        "feed_forward": 3, "feed_forward_limit": None, "head_scale": 1.0, "active_from": "invocation",
        "invocation_tokens": list(INVOCATION),
    },
    "blocks, patterns": {
        "feed_forward": 4, "rank_pattern": {"gate_proj": 2}, "scale_pattern": {"up_proj": 0.5},
        "output_limit_pattern": {"1.mlp.down_proj": 0.1}, "exclude_modules": ["2.mlp.gate_proj"],
    },
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """Tokens, and the logarithm of each one's probability."""

    tokens: list[int]
    logprobs: list[float]


def config() -> LlamaConfig:
    """Of a model whose head size vLLM's CPU kernels know."""
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip


def save_all(folder: Path) -> Path:
    """Base model, memories and LoRA, each in a folder of its name."""
    save_base(folder, config())
    for number, (name, fields) in enumerate(MEMORIES.items()):
        save_memory(folder, name, seed=number, **fields)
    save_lora(folder, "lora", ["q_proj", "v_proj"])
    for number, (name, fields) in enumerate(BLOCKS.items()):
        save_memory(folder, name, seed=10 + number, **fields)
    save_lora(folder, "lora in blocks", ["gate_proj", "up_proj", "down_proj"])
    return folder


def save_base(folder: Path, config: Any) -> None:
    """A base model with random contents."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # far from uniform: a wrong token has another probability
    model.save_pretrained(folder / BASE)
    tokenizer().save_pretrained(folder / BASE)


def save_lora(folder: Path, name: str, modules: list[str]) -> None:
    """A LoRA with random contents, in a folder of its name."""
    adapted = get_peft_model(base(folder), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=modules))
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(folder / name)


def base(folder: Path) -> Any:
    """The base model, anew."""
    return AutoModelForCausalLM.from_pretrained(folder / BASE, dtype=torch.float32).eval()


def save_memory(folder: Path, name: str, seed: int, model: Any = None, **fields: Any) -> Path:
    """A memory with random contents, in a folder of its name; of another ``model`` than the base model."""
    adapted = get_peft_model(model or base(folder), PrefixMemoryConfig(task_type="CAUSAL_LM", **fields))
    randomize(adapted, seed=seed, std=0.4)
    adapted.save_pretrained(folder / name)
    return folder / name


@cache
def _adapted(folder: Path, adapter: str, stamp: int) -> Any:
    model = base(folder)
    return model if adapter == BASE else PeftModel.from_pretrained(model, str(folder / adapter)).eval()


@torch.no_grad()
def expected(folder: Path, adapter: str, prompt: Sequence[int], count: int, scale: float | None = None) -> Answer:
    """What transformers' greedy search says; ``scale``: of a memory, instead of its config's."""
    file = folder / adapter / "adapter_model.safetensors"
    model = _adapted(folder, adapter, file.stat().st_mtime_ns if file.is_file() else 0)
    if scale is not None:
        model = copy.deepcopy(model)
        set_scale(model, scale)
    made = model.generate(
        input_ids=torch.tensor([list(prompt)]), max_new_tokens=count, do_sample=False, output_logits=True,
        return_dict_in_generate=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    tokens = made.sequences[0, len(prompt) :].tolist()
    logprobs = [float(step[0].log_softmax(-1)[token]) for step, token in zip(made.logits, tokens, strict=True)]
    return Answer(tokens, logprobs)


def prompt(length: int, seed: int, invoked: int | None = None) -> list[int]:
    """Random tokens, with the invocation so many tokens before the end; without it in them otherwise."""
    made = torch.randint(8, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    if invoked is not None:
        place = length - invoked
        made[place : place + len(INVOCATION)] = INVOCATION
    return made
