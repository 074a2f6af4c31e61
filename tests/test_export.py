"""torch.export: the program holds the memory, for rows and lengths other than those it was traced with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from close import close_logits

VARIANTS: dict[str, dict[str, Any]] = {
    "default": tiny.DEFAULT,
    "rotary": {"query": "rotary"},
    "inside": {"placement": "inside", "prefix_length": 3},
}


@pytest.mark.parametrize(("variant", "wrapped"), [("default", True), *((variant, False) for variant in VARIANTS)])
@torch.no_grad()
def test_an_exported_model_answers_as_the_model_does(variant, wrapped):
    base = tiny.build()
    base.config.use_cache = False
    model = tiny.with_memory(base, **VARIANTS[variant])
    any_size = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(
        model if wrapped else base, args=(), kwargs={"input_ids": tiny.tokens(2, 9)},
        dynamic_shapes={"input_ids": any_size}, strict=False,
    ).module()  # fmt: skip
    ids = tiny.tokens(3, 12, seed=8)
    expected = model(input_ids=ids).logits
    close_logits(program(input_ids=ids).logits, expected)
    with model.disable_adapter():
        assert (model(input_ids=ids).logits - expected).abs().max() > 1e-3
