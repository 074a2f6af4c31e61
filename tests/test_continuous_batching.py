"""transformers' continuous batching (``generate_batch``): each request gets the tokens that it gets alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import tiny
from prefixmemory import PrefixMemoryError, activation
from prefixmemory.attention.prepending import Prefix, prepend_prefix
from test_fidelity import family_model

INSIDE = dict(placement="inside", prefix_length=3)
VARIANTS: dict[str, dict[str, Any]] = {"default": tiny.DEFAULT, "full": {}, "inside": INSIDE}
PROMPTS = [row[:length].tolist() for row, length in zip(tiny.tokens(3, 9), (9, 4, 6), strict=True)]
NEW = 6


def alone(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
    )
    return made[0, len(prompt) :].tolist()


def batched(model: Any) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    made = model.generate_batch(
        PROMPTS, generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(block_size=16, num_blocks=32, max_batch_tokens=64),
    )  # fmt: skip
    return [made[name].generated_tokens for name in sorted(made, key=lambda name: int(name.rpartition("_")[2]))]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama_gqa", "gemma3"])
def test_each_request_gets_the_tokens_that_it_gets_alone(family, variant, attention):
    model = tiny.with_memory(family_model(family, attention), **VARIANTS[variant])
    model.generation_config.eos_token_id = None
    expected = [alone(model, prompt) for prompt in PROMPTS]
    with model.disable_adapter():
        assert [alone(model, prompt) for prompt in PROMPTS] != expected
    assert batched(model) == expected


def test_an_adapter_for_each_row_is_refused_rather_than_ignored():
    with pytest.raises(PrefixMemoryError, match="packs all requests into one row"):
        tiny.with_memory(tiny.build()).generate_batch(PROMPTS, adapter_names=["default"] * 3)


INVOKED = dict(active_from="invocation", invocation_tokens=PROMPTS[0][2:4])


def manager_says(model: Any) -> Any:
    """What comes of the first prompt from a manager of the caller's own, past ``generate_batch``."""
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = model.init_continuous_batching(
        generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(block_size=16, num_blocks=32, max_batch_tokens=64),
    )
    manager.start()
    try:
        manager.add_request(PROMPTS[0], max_new_tokens=NEW)
        return manager.get_result(timeout=30)
    finally:
        manager.stop(block=True, timeout=30)


def test_a_manager_of_ones_own_gives_the_tokens_too():
    model = tiny.with_memory(tiny.build(), **tiny.DEFAULT)
    model.generation_config.eos_token_id = None
    assert manager_says(model).generated_tokens == alone(model, PROMPTS[0])


def test_a_memory_that_waits_for_its_invocation_is_refused():
    model = tiny.with_memory(tiny.build(), **INVOKED)
    with pytest.raises(PrefixMemoryError, match="packs parts of many texts"):
        model.generate_batch(PROMPTS)
    assert "packs parts of many texts" in manager_says(model).error


def test_where_a_memory_speaks_by_the_callers_word_is_refused_rather_than_ignored():
    model = tiny.with_memory(tiny.build())
    with pytest.raises(PrefixMemoryError, match="packs parts of many texts"):
        model.generate_batch(PROMPTS, active=[0, 1, 2])
    with pytest.raises(PrefixMemoryError, match="packs parts of many texts"), activation([0, 1, 2]):
        model.generate_batch(PROMPTS)


def test_flash_attention_is_refused_before_anything_runs(monkeypatch):
    model = tiny.with_memory(tiny.build(), **INSIDE)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(PrefixMemoryError, match="generate_batch with flash attention"):
        model.generate_batch(PROMPTS)


@pytest.mark.parametrize(
    "keywords",
    [dict(cu_seq_lens_k=torch.tensor([0, 4, 9])), dict(position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))],
    ids=["lengths", "positions"],
)
def test_packed_rows_are_refused_where_no_mask_keeps_them_apart(keywords):
    layer = torch.nn.Identity()
    tensors = [torch.randn(1, 2, 9, 4) for _ in range(3)]
    prefix = Prefix(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), None, False)
    with pytest.raises(PrefixMemoryError, match="packed into one row"):
        prepend_prefix(prefix, layer, *tensors, None, keywords, "flash_attention_2")
    one = dict(position_ids=torch.arange(9)[None])
    assert prepend_prefix(prefix, layer, *tensors, None, one, "flash_attention_2")[0].shape[2] == 12
    # flash attention counts its window over the prefix and the text together, and would leave the prefix behind
    with pytest.raises(PrefixMemoryError, match=r"left behind by the sliding window of 11 tokens"):
        prepend_prefix(prefix, layer, *tensors, None, {"sliding_window": 11}, "flash_attention_2")
    for window, backend in ((12, "flash_attention_2"), (11, "sdpa")):
        given = {"sliding_window": window}
        assert prepend_prefix(prefix, layer, *tensors, None, given, backend)[0].shape[2] == 12
