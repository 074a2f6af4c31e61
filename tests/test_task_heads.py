"""Heads for labels of a text, of its tokens and of answers in it: PEFT trains and saves them beside the memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig

import tiny
from close import close_logits, same_parameters
from prefixmemory import PrefixMemoryConfig

BASES = {
    "bert": BertConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ),
    "llama": tiny.CONFIGS["llama_gqa"],
}  # fmt: skip
LABELS = 3
SPANS = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
#: Class of the model, and what it learns from.
TASKS: dict[str, tuple[str, dict[str, Tensor]]] = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", {"labels": torch.tensor([2, 0])}),
    "TOKEN_CLS": ("AutoModelForTokenClassification", {"labels": tiny.tokens(2, 9) % LABELS}),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", SPANS),
}
VARIANTS: dict[str, dict[str, Any]] = {"default": {}, "inside": {"placement": "inside", "prefix_length": 3}}

cells = [
    pytest.mark.parametrize("variant", VARIANTS),
    pytest.mark.parametrize("base", BASES),
    pytest.mark.parametrize("task", TASKS),
]


def every_cell(test: Any) -> Any:
    for mark in cells:
        test = mark(test)
    return test


def build(task: str, base: str, head_seed: int = 0) -> Any:
    """The same body for each ``head_seed``, as when a new head is put onto a base model from disk."""
    config = copy.deepcopy(BASES[base])
    if task != "QUESTION_ANS":
        config.num_labels = LABELS
    torch.manual_seed(0)
    model = getattr(transformers, TASKS[task][0]).from_config(config).eval()
    torch.manual_seed(10 + head_seed)
    nn.init.normal_(head_of(model).weight)
    return model


def head_of(model: nn.Module) -> Any:
    return next(getattr(model, name) for name in ("score", "classifier", "qa_outputs") if hasattr(model, name))


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    found = model(input_ids=tiny.tokens())
    return found.logits if "logits" in found else torch.stack([found.start_logits, found.end_logits], dim=-1)


def trained(task: str, base: str, variant: str) -> PeftModel:
    """After a step, with contents that show in the outputs."""
    model = get_peft_model(build(task, base), PrefixMemoryConfig(task_type=task, **VARIANTS[variant])).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(input_ids=tiny.tokens(), **TASKS[task][1]).loss.backward()
    optimizer.step()
    return model.eval()


@every_cell
def test_head_and_memory_learn_and_the_base_model_does_not(task, base, variant):
    model = trained(task, base, variant)
    before = build(task, base)
    head = head_of(model.get_base_model())
    assert (head.modules_to_save["default"].weight - head_of(before).weight).abs().max() > 1e-3
    assert all(p.grad is not None and p.grad.any() for n, p in tiny.memory_parameters(model).items() if ".A" not in n)
    with model.disable_adapter():
        assert torch.equal(outputs(model), outputs(before))
    same_parameters(model.unload(), before)


@every_cell
def test_head_and_memory_are_loaded_onto_a_base_with_another_head(task, base, variant, tmp_path):
    model = trained(task, base, variant)
    tiny.randomize(model)
    model.save_pretrained(tmp_path)
    fresh = build(task, base, head_seed=1)
    control = outputs(fresh)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    close_logits(outputs(loaded), outputs(model))
    assert (outputs(loaded) - control).abs().max() > 1e-2
    with model.disable_adapter():
        assert (outputs(loaded) - outputs(model)).abs().max() > 1e-3


def test_the_auto_class_loads_base_memory_and_head_from_the_adapter_alone(tmp_path: Path):
    model = build("SEQ_CLS", "llama")
    model.save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, PrefixMemoryConfig(task_type="SEQ_CLS")).eval()
    tiny.randomize(adapted)
    with torch.no_grad():
        head_of(base).modules_to_save["default"].weight.neg_()
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=LABELS).eval()
    close_logits(outputs(loaded), outputs(adapted))
    assert (outputs(loaded) - outputs(model)).abs().max() > 1e-2
