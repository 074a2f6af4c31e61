"""A memory in the text part of a model that sees: images go through it as words do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import tiny
from close import close_logits
from prefixmemory import PrefixMemoryConfig
from prefixmemory.attention.discovery import find_sites, left_out
from test_attention import LLAVA

VARIANTS: dict[str, dict[str, Any]] = {"default": tiny.DEFAULT, "inside": {"placement": "inside", "prefix_length": 3}}
each = pytest.mark.parametrize("variant", VARIANTS)


def build() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(copy.deepcopy(LLAVA)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


def batch(seed: int = 1) -> dict[str, Tensor]:
    """An image of four patches in front of a few words, twice."""
    ids = torch.cat([torch.full((2, 4), LLAVA.image_token_id), tiny.tokens(2, 5)], dim=1)
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": image}


@torch.no_grad()
def logits(model: Any, **changed: Any) -> Tensor:
    return model(**batch() | changed, use_cache=False).logits


def other_image() -> Tensor:
    return batch(seed=2)["pixel_values"]


@pytest.mark.parametrize(
    ("name", "has_memories", "others"),
    [
        ("IdeficsForVisionText2Text", "model.layers.", "model.vision_model."),
        ("KyutaiSpeechToTextForConditionalGeneration", "model.layers.", "codec_model."),
        ("CsmForConditionalGeneration", "backbone_model.", "codec_model."),
        ("EvollaForProteinText2Text", "model.layers.", "model.protein_encoder."),
    ],
)
def test_memories_stand_in_the_text_part_alone(name, has_memories, others):
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind._from_config(kind.config_class())
    sites = find_sites(model)
    left = left_out(model, sites)
    assert left and len(left) < len(sites)
    assert all(site.startswith(has_memories) for site in sites if site not in left)
    assert any(site.startswith(others) for site in left)


@each
def test_saved_and_loaded_it_sees_the_same(variant, tmp_path):
    model = tiny.with_memory(build(), **VARIANTS[variant])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    close_logits(logits(loaded), logits(model))
    assert (logits(loaded) - logits(build())).abs().max() > 1e-3
    assert (logits(loaded) - logits(model, pixel_values=other_image())).abs().max() > 1e-3


@each
def test_each_row_has_its_image_and_its_adapter(variant):
    model = tiny.with_memory(build(), **VARIANTS[variant])
    model.add_adapter("other", PrefixMemoryConfig(task_type="CAUSAL_LM", **VARIANTS[variant]))
    tiny.randomize(model, "other", seed=5)
    mixed = logits(model, adapter_names=["other", "__base__"])
    close_logits(mixed[1], logits(build())[1], amplified=10)
    model.set_adapter("other")
    close_logits(mixed[0], logits(model)[0], amplified=10)
    assert (mixed[0] - logits(build())[0]).abs().max() > 1e-3


@each
def test_what_it_generates_is_what_whole_passes_would_say(variant):
    model = tiny.with_memory(build(), **VARIANTS[variant])
    made = model.generate(**batch(), max_new_tokens=5, min_new_tokens=5, do_sample=False, eos_token_id=2)
    ids = made[:, :-1]
    scores = logits(model, input_ids=ids, attention_mask=torch.ones_like(ids))[:, -5:]
    scores[..., 2] = -torch.inf
    assert torch.equal(scores.argmax(-1), made[:, -5:])
    seeing_otherwise = logits(model, input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=other_image())
    assert not torch.equal(seeing_otherwise[:, -5:].argmax(-1), made[:, -5:])
