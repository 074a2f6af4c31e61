"""Models whose output embeddings are their input embeddings: a memory leaves them tied, a trained head has its own."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny
from close import close_logits
from prefixmemory import PrefixMemoryConfig

FAMILIES = ("gemma2", "gemma3", "gpt2")
families = pytest.mark.parametrize("family", FAMILIES)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=tiny.tokens(), use_cache=False).logits


def tied(model: nn.Module) -> bool:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.get_output_embeddings().weight is base.get_input_embeddings().weight


def test_the_families_are_tied_and_another_is_not():
    assert all(tied(tiny.build(family)) for family in FAMILIES) and not tied(tiny.build("llama_gqa"))


@families
def test_they_stay_tied_through_a_step_a_copy_and_unloading(family):
    model = tiny.with_memory(tiny.build(family), **tiny.DEFAULT).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    optimizer.step()
    assert tied(model) and tied(copy.deepcopy(model)) and tied(model.unload())


@families
def test_the_adapter_alone_is_saved_and_comes_back(family, tmp_path: Path):
    model = tiny.with_memory(tiny.build(family), **tiny.DEFAULT)
    model.save_pretrained(tmp_path)
    assert all("prefix_memory" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(tiny.build(family), tmp_path)
    close_logits(logits(loaded), logits(model))
    assert tied(loaded) and (logits(loaded) - logits(tiny.build(family))).abs().max() > 1e-3


@families
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_a_head_that_is_trained_moves_away_from_the_embeddings(family, tmp_path: Path):
    base = tiny.build(family)
    before = logits(base)
    model = tiny.with_memory(base, modules_to_save=["lm_head"], **tiny.DEFAULT)
    head = base.get_output_embeddings()
    with torch.no_grad():
        head.modules_to_save["default"].weight.neg_()
    assert torch.equal(head.original_module.weight, base.get_input_embeddings().weight)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path)
    close_logits(logits(PeftModel.from_pretrained(tiny.build(family), tmp_path)), logits(model))
    assert tied(model.unload())


def test_an_adapter_of_a_tied_model_does_not_depend_on_the_tie(tmp_path: Path):
    """An untied copy of the same model is the same base."""
    model = tiny.with_memory(tiny.build("gemma2"), **tiny.DEFAULT)
    model.save_pretrained(tmp_path)
    untied = tiny.build("gemma2")
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    assert not tied(untied)
    close_logits(logits(PeftModel.from_pretrained(untied, tmp_path)), logits(model))
    assert PrefixMemoryConfig.from_pretrained(tmp_path).modules_to_save is None
