"""Kernels that rotate a query where it lies, as Liger's do, leave the memory its content query."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama
from transformers.models.llama4 import modeling_llama4
from transformers.models.qwen3 import modeling_qwen3

import family_models
import tiny
from prefixmemory.attention.discovery import find_sites
from prefixmemory.attention.sites import AttentionSite
from prefixmemory.tuner.layers import memory_layers

MODELING = {"llama": modeling_llama, "qwen3": modeling_qwen3}
rotate = modeling_llama.apply_rotary_pos_emb


def rotate_in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    """What is written past autograd is not noticed, as with a Triton kernel."""
    with torch.no_grad():
        rotated = rotate(q, k, cos, sin)
    q.data.copy_(rotated[0])
    k.data.copy_(rotated[1])
    return q, k


@pytest.mark.parametrize("family", MODELING)
def test_the_memory_reads_the_query_as_it_was(family, monkeypatch):
    model, ids = tiny.with_memory(tiny.build(family)), tiny.tokens()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        monkeypatch.setattr(MODELING[family], "apply_rotary_pos_emb", rotate_in_place)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
        monkeypatch.setattr(AttentionSite, "may_write_into_queries", False)
        assert (model(input_ids=ids).logits - expected).abs().max() > 1e-2  # it would be seen
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=ids).logits, base)


def test_rotations_of_other_names_are_known(monkeypatch):
    """Llama 4 calls ``apply_rotary_emb``."""
    (site, *_) = find_sites(family_models.build(family_models.CASES["llama4"])).values()
    assert not site.may_write_into_queries
    monkeypatch.setattr(modeling_llama4, "apply_rotary_emb", rotate_in_place)
    assert site.may_write_into_queries


def test_transformers_own_rotation_is_known_to_leave_it():
    assert not any(layer.site.may_write_into_queries for layer in memory_layers(tiny.with_memory(tiny.build())))


def test_a_forward_of_others_is_not(monkeypatch):
    site = next(iter(memory_layers(tiny.with_memory(tiny.build())))).site
    forward = type(site.core).forward
    monkeypatch.setattr(type(site.core), "forward", lambda *args, **kwargs: forward(*args, **kwargs))
    assert site.may_write_into_queries
